"""A segmenter: a library's backbone, a head, and a forward pass that computes visible units only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from maskmatch_scale.models.backbone import Encoder, Family
from maskmatch_scale.models.channels import COLOURS
from maskmatch_scale.models.context import ContextDecoder
from maskmatch_scale.models.deferred import DeferredWeights
from maskmatch_scale.models.families import only_these_compile, only_these_number_layers
from maskmatch_scale.models.units import (
    Grid,
    can_be_read,
    check_visible,
    merge_units,
    visible_pixel_mask,
    zero_masked_pixels,
)

MaskMode = Literal["drop", "zero"]
Frozen = int | Literal["backbone"]
"""The first layers of a backbone, by their number, or all of it."""
_MODES = ("drop", "zero")


class Segmenter(nn.Module):
    """Backbone, head and context decoder; built by `build_segmenter`.

    Parameters lie under `backbone.` (timm's or transformers' names), `head.` and `context.`. The context decoder is
    used in training only, so exports leave it out.

    A call with `visible` never changes running statistics of BatchNorm. In training it normalises by its own batch.
    A teacher or an export runs on whole images and must be normalised by statistics of whole images.

    Decision: docs/decisions/0013-masked-passes-leave-running-statistics.md.

    Attributes:
        num_classes: number of classes.
        unit_px: side of a maskable unit, pixels.
        patch_px: whole images must be whole patches of this side, pixels; 1 if any size is taken.
        channels: names of the channels of images, in their order.
        mean: per-channel mean of values in 0–1 that the backbone's weights expect.
        std: per-channel standard deviation, likewise.
        family: what kind of backbone it is.
        encoder: runs the backbone.
        backbone: the library's module.
        head: features to logits.
        context: features for masked units, or None.
        start_notes: a line on each part of the weights it was built from that was not loaded or did not fit.
        deferred: makes the values of parameters that are on the meta device; None if there are none (the usual case).
        frozen: what of the backbone is not trained; None: all of it is.
    """

    deferred: DeferredWeights | None = None
    start_notes: tuple[str, ...] = ()
    frozen: Frozen | None = None

    def __init__(
        self,
        family: Family,
        encoder: Encoder,
        head: nn.Module,
        context: ContextDecoder | None,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        channels: tuple[str, ...] = COLOURS,
    ) -> None:
        super().__init__()
        self.backbone: nn.Module = encoder.model
        self.head = head
        self.context = context
        self.num_classes = num_classes
        self.unit_px = encoder.unit_px
        self.patch_px = encoder.patch_px
        self.mean, self.std, self.channels = mean, std, channels
        self.family = family
        self.encoder = encoder  # not a module: it runs `backbone`, and deepcopy copies the two together
        self._in_eval_mode: list[nn.Module] = []  # part of `backbone`, and copied with it

    @property
    def in_channels(self) -> int:
        """Number of channels of images."""
        return len(self.channels)

    @property
    def sees_colours(self) -> bool:
        """Whether the channels are red, green and blue, in this order."""
        return self.channels == COLOURS

    def freeze(self, frozen: Frozen) -> None:
        """Train the backbone, or its first layers, no longer: no gradients, and always in eval mode.

        Eval mode means no dropout and no stochastic depth there: as DINOv2's evaluations have it, features of a frozen
        part depend on the image alone. With `frozen` layers everything below them is frozen too (a ViT's embeddings and
        tokens), so autograd records nothing for it, and keeps no activations. Head and context decoder stay trained.

        Decision: docs/decisions/0056-frozen-parts.md.

        Args:
            frozen: how many of `Encoder.layers`, or `backbone`, which includes what follows the last layer.

        Raises:
            ValueError: the backbone does not have so many layers; says how many it has.
        """
        layers, title = self.encoder.layers, self.family.layer_title
        if frozen == "backbone":
            trained: set[nn.Module] = set()
        elif 1 <= frozen <= len(layers):
            trained = {*layers[frozen:], *self.encoder.after_layers}
            self.encoder.frozen_layers = frozen
        else:
            has = f"this {self.family.title} has {len(layers)} {title}" if layers else "its layers are not counted"
            fits = f"a number from 1 to {len(layers)}, " if layers else ""
            raise ValueError(f"{has}; use {fits}backbone or null")
        self.frozen = frozen
        still = {parameter for module in trained for parameter in module.parameters()}
        for parameter in self.backbone.parameters():
            if parameter not in still:
                parameter.requires_grad_(False)
        self._in_eval_mode = list(_largest_without(self.backbone, trained))
        self.train(self.training)

    def train(self, mode: bool = True) -> Segmenter:
        """As `nn.Module.train`, but what is frozen stays in eval mode."""
        super().train(mode)
        for module in self._in_eval_mode:
            module.eval()
        return self

    def compile_blocks(self) -> None:
        """torch.compile the backbone's blocks, in place; copy the segmenter before this call, not after it.

        Raises:
            ValueError: the family's blocks are not compiled.
        """
        if not self.family.compiles_blocks:
            raise ValueError(f"compile: {only_these_compile()}; leave a {self.family.title} as it is")
        self.encoder.compile_blocks()

    def layer_ids(self) -> dict[str, int]:
        """Number of the layer of each of the backbone's parameters, from 0 at the input, by name in this module.

        Raises:
            ValueError: the family's layers are not numbered.
        """
        if not self.family.numbers_layers:
            raise ValueError(f"layer_decay: {only_these_number_layers()}, not for a {self.family.title}")
        return {f"backbone.{name}": layer for name, layer in self.encoder.layer_ids().items()}

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming sizes that fit, if a whole image of height × width px cannot be taken."""
        self.encoder.check_size(height, width)

    def unit_grid(self, height: int, width: int) -> Grid:
        """(rows, cols) of units of an image of height × width px.

        Raises:
            ValueError: the image is not whole units; names sizes and units that fit.
        """
        unit = self.unit_px
        if height % unit or width % unit:
            near = "×".join(str(max(unit, round(side / unit) * unit)) for side in (height, width))
            smaller = [px for px in range(unit, 0, -1) if height % px == width % px == 0 and self.encoder.unit_fits(px)]
            remedy = f", or build with unit_px={smaller[0]}" if smaller else ""
            raise ValueError(
                f"images: {height}×{width} px is not whole units of {unit} px, which masked calls need; use sides that "
                f"are multiples of {unit}, e.g. {near}{remedy}"
            )
        return height // unit, width // unit

    def encode(self, images: Tensor, visible: Tensor | None = None, mode: MaskMode = "drop") -> list[Tensor]:
        """Run the backbone alone.

        Args:
            images: float (B, in_channels, H, W), normalised by `mean` and `std`.
            visible: int64 (B, k), sorted indices of visible units, row-major on the unit grid; None: the whole image.
            mode: `drop` computes nothing for masked units. `zero` sets their pixels to zero and computes everything; it
                is the published baseline, another function at full cost.

        Returns:
            One tensor a level, finest first: maps (B, C, h, w), or in drop mode the visible units' tokens
            (B, k, r, r, C), r = tokens a side of a unit (`units.merge_units` lays them out).

        Raises:
            ValueError: a size, mask or mode that does not fit.
        """
        if mode not in _MODES:
            raise ValueError(f"mode: {mode!r} is not one of {', '.join(_MODES)}")
        if images.ndim != 4 or images.shape[1] != self.in_channels or not images.is_floating_point():
            own = "" if self.sees_colours else f", with the channels {', '.join(self.channels)}"
            raise ValueError(
                f"images: {images.dtype} {tuple(images.shape)}; it must be float (B, {self.in_channels}, H, W), "
                f"normalised{own}"
            )
        if visible is None:
            self.encoder.check_size(*images.shape[2:])
            self._check_finite(images)
            return self.encoder.full(images)
        grid = self.unit_grid(*images.shape[2:])
        check_visible(visible, len(images), grid, images.device)
        self._check_finite(images, visible)
        if mode == "zero":
            return self.encoder.full(zero_masked_pixels(images, visible, grid, self.unit_px))
        return self.encoder.visible(images, visible, grid)

    def _check_finite(self, images: Tensor, visible: Tensor | None = None) -> None:
        """Refuse NaN and infinity in what is computed; on the CPU only, since elsewhere the check would stall."""
        if not can_be_read(images):
            return
        if bool(images.detach().sum(dtype=torch.promote_types(images.dtype, torch.float32)).isfinite()):
            return
        bad = ~images.detach().isfinite()
        if visible is not None:  # masked units are never read
            bad &= visible_pixel_mask(visible, self.unit_grid(*images.shape[2:]), self.unit_px)[:, None]
        if bool(bad.any()):
            value, image = float(images.detach()[bad][0]), int(bad.nonzero()[0, 0])
            count = int(bad.sum())
            raise ValueError(f"images: {count} values are not finite, e.g. {value} in image {image} of {len(images)}")

    def decode(
        self,
        features: list[Tensor],
        size_px: tuple[int, int],
        visible: Tensor | None = None,
        mode: MaskMode = "drop",
    ) -> Tensor:
        """Features to logits: what a call does with the result of `encode`.

        Args:
            features: as `encode` gives them, for the same `visible` and `mode`.
            size_px: (H, W) of the images.
            visible: int64 (B, k), see `encode`. In drop mode the features of masked units come from the context
                decoder; without one they are zero.
            mode: `drop` or `zero`, see `encode`.

        Returns:
            (B, num_classes, h, w), at least float32.
        """
        if visible is None:
            logits: Tensor = self.head(features)
        else:
            if mode == "drop":
                features = self._complete(features, visible, self.unit_grid(*size_px))
            with _running_statistics_kept(self.head):
                logits = self.head(features)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        mode: MaskMode = "drop",
        *,
        perturb: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> Tensor:
        """Logits of images: `encode`, `perturb` if there is one, `decode`.

        Args:
            images: float (B, in_channels, H, W), normalised by `mean` and `std`.
            visible: int64 (B, k), see `encode` and `decode`.
            mode: `drop` or `zero`, see `encode`.
            perturb: changes features, one tensor a level as `encode` gives them, to features of the same shapes. It is
                an argument of the call, so that backbone, perturbation and head run within one call of this module,
                which is what an engine's hooks see.

        Returns:
            (B, num_classes, h, w); upsample bilinearly to (H, W) for a prediction a pixel.

        Raises:
            ValueError: a size, mask or mode that does not fit.
        """
        features = self.encode(images, visible, mode)
        if perturb is not None:
            features = perturb(features)
        return self.decode(features, (images.shape[2], images.shape[3]), visible, mode)

    def _complete(self, features: list[Tensor], visible: Tensor, grid: Grid) -> list[Tensor]:
        """Unit tokens (B, k, r, r, C) of visible units to maps (B, C, h, w) of whole images, of every level."""
        others: list[Tensor] | list[None] = [None] * len(features)
        if self.context is not None and visible.shape[1] < grid[0] * grid[1]:
            others = self.context(features, visible, grid)
        return [merge_units(tokens, visible, other, grid) for tokens, other in zip(features, others)]


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """While this is entered, batch norms in a module normalise by their batch but keep their running statistics."""
    tracking = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _largest_without(module: nn.Module, others: Collection[nn.Module]) -> Iterator[nn.Module]:
    """The largest parts of a module in which none of the others is."""
    if module in others:
        return
    if not any(part in others for part in module.modules()):
        yield module
        return
    for child in module.children():
        yield from _largest_without(child, others)
