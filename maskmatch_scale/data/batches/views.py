"""From a place in the order to the weak view of its sample, which is read, decoded and cropped.

The parameters of the view are drawn from the place.

Decision: docs/decisions/0006-draws-by-place.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from maskmatch_scale.data.batches.augment import WeakView, rare_class_pixel
from maskmatch_scale.data.images.bands import Channels
from maskmatch_scale.data.images.decode import decode_image, decode_label
from maskmatch_scale.data.order.lane import LaneState
from maskmatch_scale.data.order.queue import SamplePlace
from maskmatch_scale.data.order.sequential import SequentialSource
from maskmatch_scale.data.order.source import Skip, WeightedSource
from maskmatch_scale.data.shards.folder import channels_of
from maskmatch_scale.data.shards.reading import RawSample
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.seeds import generator


def label_map(raw: RawSample, num_classes: int, ignore_index: int, size: tuple[int, int] | None = None) -> Tensor:
    """The label map of a labelled sample, decoded.

    Args:
        raw: the sample.
        num_classes: values from here on are refused, except ``ignore_index``.
        ignore_index: value of ignored pixels.
        size: (H, W) that it must have, in px; None allows any.

    Returns:
        uint8 (H, W).

    Raises:
        BadSample: it cannot be used.
    """
    assert raw.label is not None
    return decode_label(raw.label, raw.name, num_classes=num_classes, ignore_index=ignore_index, size=size)


class SampleViews:
    """Weak views of the samples of a run. The view of a place is the same whichever process makes it.

    Args:
        recipe: section data, ``run.seed`` and ``method.teacher_margin_px`` are read.
        num_classes: classes of the model.
        ignore_index: label value of ignored pixels.
        channel_names: what the model sees, in its order.
        class_pixels: gives int64 (classes,), the pixels of each class in the labelled samples. It is called only for
            crops around a pixel of a rare class.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        ignore_index: int,
        channel_names: Sequence[str],
        class_pixels: Callable[[], Tensor],
    ) -> None:
        data = recipe.data
        self._data, self._seed = data, recipe.run.seed
        self._num_classes, self._ignore_index = num_classes, ignore_index
        self._channel_names, self._class_pixels = channel_names, class_pixels
        self._weak_view = WeakView(data.crop_px, data.scale_range, data.flip_probability, ignore_index)
        self._with_margin = replace(self._weak_view, margin_px=recipe.method.teacher_margin_px)

    def labelled(self, source: WeightedSource, place: SamplePlace) -> tuple[Tensor, Tensor, list[Skip]]:
        """The view of a labelled sample.

        Returns:
            image uint8 (C, h, w); label map uint8 (h, w), ignore_index on padding; the sample at ``place`` if another
            one replaces it.

        Raises:
            DataError: see :meth:`WeightedSource.load`.
        """
        channels = self._channels(source)

        def decode(raw: RawSample) -> tuple[Tensor, Tensor]:
            image = decode_image(
                raw.image, raw.name, channels=channels, max_pixels=self._data.max_image_px, contiguous=False
            )
            size = (image.shape[-2], image.shape[-1])
            return image, label_map(raw, self._num_classes, self._ignore_index, size)

        (image, label), skipped = source.load(place, decode)
        draws = generator(self._seed, "labelled view", source.name, place.epoch, place.place)
        around = None
        if float(torch.rand((), generator=draws)) < self._data.rare_class_crops:
            pixels = self._class_pixels()
            weight = pixels.clamp(min=1).double().rsqrt() * (pixels > 0)
            around = rare_class_pixel(label, weight, draws)
        view, target, _ = self._weak_view(image, label, draws, around)
        assert target is not None
        return view, target, skipped

    def unlabelled(self, source: WeightedSource, place: SamplePlace) -> tuple[Tensor, Tensor, list[Skip]]:
        """The view of an unlabelled sample.

        Returns:
            image uint8 (C, h + 2 m, w + 2 m), the view and its margin; valid bool (h, w) of the view, False on
            padding; the sample at ``place`` if another one replaces it.

        Raises:
            DataError: see :meth:`WeightedSource.load`.
        """
        channels = self._channels(source)
        image, skipped = source.load(place, partial(self._decode_unlabelled, channels=channels))
        return (*self._unlabelled_view(image, source.name, place), skipped)

    def next_unlabelled(
        self, source: SequentialSource, lane: int
    ) -> tuple[Tensor, Tensor, list[Skip], SamplePlace, LaneState]:
        """The view of the next sample of a lane.

        Returns:
            image uint8 (C, h + 2 m, w + 2 m) and valid bool (h, w), as :meth:`unlabelled` returns them; the samples
            that were skipped before it; its place; where the lane is after it.

        Raises:
            DataError: see :meth:`SequentialSource.load`.
        """
        image, place, skipped, state = source.load(lane, self._decode_unlabelled)
        return (*self._unlabelled_view(image, source.name, place), skipped, place, state)

    def _channels(self, source: WeightedSource) -> Channels | None:
        """What is decoded of the images of a source; None: RGB."""
        return channels_of(source.stream.index, self._data, source.stream.root, self._channel_names)

    def _decode_unlabelled(self, raw: RawSample, channels: Channels | None = None) -> Tensor:
        return decode_image(
            raw.image,
            raw.name,
            channels=channels,
            max_pixels=self._data.max_image_px,
            exif_orientation=self._data.exif_orientation,
            contiguous=False,
        )

    def _unlabelled_view(self, image: Tensor, source: str, place: SamplePlace) -> tuple[Tensor, Tensor]:
        draws = generator(self._seed, "unlabelled view", source, place.epoch, place.place)
        view, _, valid = self._with_margin(image, None, draws)
        return view, valid
