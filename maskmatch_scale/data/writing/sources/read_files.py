"""From the files of one sample to what is stored: what a process of the writer does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.encode import encode_label
from maskmatch_scale.data.images.orientation import ON_THEIR_SIDE, UPRIGHT, orientation_of, upright
from maskmatch_scale.data.writing.protocol import EncodedSample
from maskmatch_scale.data.writing.sources.annotations import AnnotationRule
from maskmatch_scale.data.writing.sources.classes import IGNORE
from maskmatch_scale.data.writing.sources.label_rule import LabelRule
from maskmatch_scale.data.writing.sources.store_bands import BandRule, store_bands
from maskmatch_scale.data.writing.sources.store_image import Stored, store_image


class FileItem(NamedTuple):
    """One sample: its key, and its files or its annotations as in :class:`Pair`."""

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
        bands: how images with bands are read; None: images are plain ones.
        annotations: what draws label maps of an item's annotations; None: items name the files of label maps.
        apply_exif: as in :class:`Options`.
    """

    root: str
    rules: tuple[tuple[str, LabelRule], ...]
    max_side: int | None
    bands: BandRule | None = None
    annotations: AnnotationRule | None = None
    apply_exif: bool = False

    def __call__(self, item: FileItem) -> EncodedSample:
        """Read, check and encode.

        Raises:
            BadSample: a file is missing, empty, unreadable or too large, or the label map does not fit the image.
        """
        path = str(Path(self.root, item.image))
        image = read_file(path, "no_image")
        shown = upright(image, path) if self.apply_exif else image
        stored, known = self._stored(shown, path, item.label is not None)
        if item.label is None:
            return EncodedSample(item.key, stored.data, stored.extension)
        path, rule, label = self.label_name(item), self.rule_of(item.label), self.label_data(item.label)
        if self.annotations is not None:
            refuse_flipped(stored.data, path, stored.original)
        values = rule.read(label, path)
        is_turned = values.shape[:2] == stored.original != stored.original[::-1]
        why = self._why_turned(image) if is_turned else ""
        check_label_size(path, values.shape[:2], item.image, stored.original[::-1], why)
        if known is not None:
            values = np.where(known, values, np.uint8(IGNORE))
        if stored.size != stored.original:
            values = np.asarray(Image.fromarray(values).resize(stored.size, Image.Resampling.NEAREST))
        elif known is None and rule.keeps(label):
            return EncodedSample(item.key, stored.data, stored.extension, label)
        return EncodedSample(item.key, stored.data, stored.extension, encode_label(values))

    def _stored(self, data: bytes, path: str, labelled: bool) -> tuple[Stored, NDArray[np.bool_] | None]:
        """The image as it is stored, and which of its pixels have data, (H, W); None: all."""
        if self.bands is None:
            return store_image(data, path, labelled=labelled, max_side=self.max_side), None
        return store_bands(data, path, self.bands, max_side=self.max_side)

    def label_name(self, item: FileItem) -> str:
        """What messages call the label map of an item that has one."""
        if self.annotations is not None:
            return f"annotations of {Path(self.root, item.image)}"
        return str(Path(self.root, item.label or ""))

    def rule_of(self, label: str) -> LabelRule | AnnotationRule:
        """What makes class values of a label."""
        if self.annotations is not None:
            return self.annotations
        return next(rule for end, rule in self.rules if label.endswith(end))

    def label_data(self, label: str) -> bytes:
        """What :meth:`rule_of` reads.

        Raises:
            BadSample: it cannot be read.
        """
        if self.annotations is not None:
            return label.encode()
        path = str(Path(self.root, label))
        data = read_file(path, "no_label")
        return upright(data, path) if self.apply_exif else data

    def _why_turned(self, data: bytes) -> str:
        """Why a label map has the width and height of its image exchanged, if EXIF data say it; otherwise empty.

        Args:
            data: the image, as it is in its file.
        """
        orientation = orientation_of(data)
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


def check_label_size(label: str, size: tuple[int, ...], image: str, of_image: tuple[int, ...], why: str = "") -> None:
    """Raise :class:`BadSample` for a label map of another height and width than its image; `why` ends the message."""
    if size != of_image:
        (own_height, own_width), (height, width) = size, of_image
        what = f"{own_width} × {own_height} px, but its image {image} has {width} × {height}{why}"
        raise BadSample("label_size", f"{label}: {what}")


def refuse_flipped(image: bytes | Path, name: str, size: tuple[int, ...]) -> None:
    """Raise for a photo that its EXIF data turns to an image of the same `size`: annotations of both fit it."""
    orientation = orientation_of(image)
    if orientation != UPRIGHT and (orientation not in ON_THEIR_SIDE or size[0] == size[1]):
        what = f"the photo is turned by EXIF orientation {orientation}, and the annotations do not say whether they are"
        raise BadSample("label_size", f"{name}: {what}; if they were drawn upright, --apply-exif turns the photo")


def read_file(path: str, if_missing: str) -> bytes:
    """The bytes of a file; :class:`BadSample` with the reason `if_missing` if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(if_missing, f"{path}: cannot be read ({error.strerror})") from None
