"""From the files of one sample to what is stored: what a process of the writer does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.encode import encode_label
from maskmatch_scale.data.images.orientation import ON_THEIR_SIDE, orientation_of, upright
from maskmatch_scale.data.writing.protocol import EncodedSample
from maskmatch_scale.data.writing.sources.label_rule import LabelRule
from maskmatch_scale.data.writing.sources.store_image import store_image


class FileItem(NamedTuple):
    """One sample: its key, and its files as in :class:`Pair`."""

    key: str
    image: str
    label: str | None


@dataclass(frozen=True)
class ReadFiles:
    """From an item to its sample; picklable.

    Args:
        root: what paths are relative to.
        rules: pairs of an ending of label maps' names and the rule for their values; the first ending that fits counts.
        max_side: as in :class:`Options`.
        apply_exif: as in :class:`Options`.
    """

    root: str
    rules: tuple[tuple[str, LabelRule], ...]
    max_side: int | None
    apply_exif: bool = False

    def __call__(self, item: FileItem) -> EncodedSample:
        """Read, check and encode.

        Raises:
            BadSample: a file is missing, empty, unreadable or too large, or the label map does not fit the image.
        """
        path = str(Path(self.root, item.image))
        image = self._read(path, "no_image")
        stored = store_image(image, path, labelled=item.label is not None, max_side=self.max_side)
        if item.label is None:
            return EncodedSample(item.key, stored.data, stored.extension)
        path = str(Path(self.root, item.label))
        data = self._read(path, "no_label")
        rule = next(rule for end, rule in self.rules if item.label.endswith(end))
        values = rule.read(data, path)
        size = (values.shape[1], values.shape[0])
        if size != stored.original:
            (width, height), (own_width, own_height) = stored.original, size
            what = f"{own_width} × {own_height} px, but its image {item.image} has {width} × {height}"
            why = self._why_turned(image, item.image) if size == stored.original[::-1] else ""
            raise BadSample("label_size", f"{path}: {what}{why}")
        if stored.size != stored.original:
            values = np.asarray(Image.fromarray(values).resize(stored.size, Image.Resampling.NEAREST))
        elif rule.keeps(data):
            return EncodedSample(item.key, stored.data, stored.extension, data)
        return EncodedSample(item.key, stored.data, stored.extension, encode_label(values))

    def _read(self, path: str, if_missing: str) -> bytes:
        """The bytes of a file, turned upright if that is asked for.

        Raises:
            BadSample: with the reason `if_missing` if it cannot be read.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BadSample(if_missing, f"{path}: cannot be read ({error.strerror})") from None
        return upright(data, path) if self.apply_exif else data

    def _why_turned(self, image: bytes, name: str) -> str:
        """Why a label map has the width and height of its image exchanged, if EXIF data say it; otherwise empty."""
        orientation = orientation_of(Path(self.root, name).read_bytes() if self.apply_exif else image)
        if orientation not in ON_THEIR_SIDE:
            return ""
        if self.apply_exif:
            return (
                ": --apply-exif has turned the photo, and its label map fits it as it is stored; leave that option out"
            )
        return (
            f": the photo is stored turned (EXIF orientation {orientation}), and its label map was drawn upright; "
            "--apply-exif turns the photo's pixels"
        )
