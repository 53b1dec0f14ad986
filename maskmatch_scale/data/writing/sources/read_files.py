"""From the files of one sample to what is stored: what a process of the writer does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.encode import encode_label
from maskmatch_scale.data.images.image import orientation_of
from maskmatch_scale.data.writing.protocol import EncodedSample
from maskmatch_scale.data.writing.sources.annotations import AnnotationRule
from maskmatch_scale.data.writing.sources.label_rule import LabelRule
from maskmatch_scale.data.writing.sources.store_image import store_image


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
        annotations: what draws label maps of an item's annotations; None: items name the files of label maps.
    """

    root: str
    rules: tuple[tuple[str, LabelRule], ...]
    max_side: int | None
    annotations: AnnotationRule | None = None

    def __call__(self, item: FileItem) -> EncodedSample:
        """Read, check and encode.

        Raises:
            BadSample: a file is missing, empty, unreadable or too large, or the label map does not fit the image.
        """
        path = str(Path(self.root, item.image))
        stored = store_image(_read(path, "no_image"), path, labelled=item.label is not None, max_side=self.max_side)
        if item.label is None:
            return EncodedSample(item.key, stored.data, stored.extension)
        rule: LabelRule | AnnotationRule
        if self.annotations is not None:
            path, data, rule = f"annotations of {path}", item.label.encode(), self.annotations
            _refuse_flipped(stored.data, path)
        else:
            path = str(Path(self.root, item.label))
            data = _read(path, "no_label")
            rule = next(rule for end, rule in self.rules if item.label.endswith(end))
        values = rule.read(data, path)
        size = (values.shape[1], values.shape[0])
        if size != stored.original:
            (width, height), (own_width, own_height) = stored.original, size
            what = f"{own_width} × {own_height} px, but its image {item.image} has {width} × {height}"
            raise BadSample("label_size", f"{path}: {what}")
        if stored.size != stored.original:
            values = np.asarray(Image.fromarray(values).resize(stored.size, Image.Resampling.NEAREST))
        elif rule.keeps(data):
            return EncodedSample(item.key, stored.data, stored.extension, data)
        return EncodedSample(item.key, stored.data, stored.extension, encode_label(values))


def _refuse_flipped(image: bytes, name: str) -> None:
    """Raise for a photo that its EXIF data turns to an image of the same size: annotations of both fit it."""
    if (orientation := orientation_of(image)) in (2, 3, 4):
        what = f"the photo is turned by EXIF orientation {orientation}, and the annotations do not say whether they are"
        raise BadSample("label_size", f"{name}: {what}; save it upright and without that (`mogrify -auto-orient`)")


def _read(path: str, if_missing: str) -> bytes:
    """The bytes of a file; :class:`BadSample` with the reason `if_missing` if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(if_missing, f"{path}: cannot be read ({error.strerror})") from None
