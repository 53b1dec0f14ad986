"""One rank's micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskmatch_scale.data.images.bands import RGB_NAMES
from maskmatch_scale.data.order.lane import LaneState
from maskmatch_scale.data.order.source import Skip
from maskmatch_scale.data.remote.shard_cache import NOTHING, Fetched


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch: B labelled and U unlabelled images of C channels, h × w px. In host memory."""

    labelled_images: Tensor
    """uint8 (B, C, h, w), the weak view; B may be 0."""
    labels: Tensor
    """uint8 (B, h, w), ignore_index where nothing counts."""
    unlabelled_images: Tensor
    """uint8 (U, C, h + 2 m, w + 2 m), the weak view and a margin of m px around it (`method.teacher_margin_px`); U may
    be 0."""
    unlabelled_valid: Tensor
    """bool (U, h, w), False on padding, of the weak view alone."""
    draws: Tensor
    """float64 (U, d): what the method drew for each unlabelled image (strong views, masks) from its position; d may be
    0. (B, d) for the labelled images where no unlabelled ones are read. This room does not know what the numbers mean.
    """
    positions: tuple[int, ...]
    """For each image that `draws` are for a number made from its place (source, epoch, number in the epoch)."""
    skipped: tuple[Skip, ...] = ()
    """Samples that could not be used and were skipped for this batch."""
    fetched: Fetched = NOTHING
    """What the process that made the batch has fetched from other machines since the batch that it made before."""
    lanes: tuple[tuple[str, int, LaneState], ...] = ()
    """Of each lane of a source without an index that it has samples of: the source, its number, and where it is now."""

    @classmethod
    def empty(
        cls,
        labelled: int,
        unlabelled: int,
        size: tuple[int, int],
        draws: int = 0,
        margin_px: int = 0,
        channels: int = len(RGB_NAMES),
    ) -> Batch:
        """A batch of uninitialised memory.

        Args:
            labelled: number of labelled images, B.
            unlabelled: number of unlabelled images, U.
            size: (h, w) in px.
            draws: numbers that are drawn for each unlabelled (or, without any, labelled) image, d.
            margin_px: around the weak view of unlabelled images, m.
            channels: of the images, C.
        """
        rows, columns = size
        return cls(
            torch.empty(labelled, channels, rows, columns, dtype=torch.uint8),
            torch.empty(labelled, rows, columns, dtype=torch.uint8),
            torch.empty(unlabelled, channels, rows + 2 * margin_px, columns + 2 * margin_px, dtype=torch.uint8),
            torch.empty(unlabelled, rows, columns, dtype=torch.bool),
            torch.empty(unlabelled or labelled, draws, dtype=torch.float64),
            (),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All tensors, in the order in which :meth:`with_tensors` takes them."""
        return self.labelled_images, self.labels, self.unlabelled_images, self.unlabelled_valid, self.draws

    def with_tensors(self, tensors: Sequence[Tensor]) -> Batch:
        """The same batch with other tensors, such as copies in other memory."""
        labelled_images, labels, unlabelled_images, unlabelled_valid, draws = tensors
        return replace(
            self,
            labelled_images=labelled_images,
            labels=labels,
            unlabelled_images=unlabelled_images,
            unlabelled_valid=unlabelled_valid,
            draws=draws,
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return self.with_tensors([tensor.to(device, non_blocking=True) for tensor in self.tensors])
