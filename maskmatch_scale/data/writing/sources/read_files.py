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
from maskmatch_scale.data.writing.protocol import EncodedSample
from maskmatch_scale.data.writing.sources.classes import IGNORE
from maskmatch_scale.data.writing.sources.label_rule import LabelRule
from maskmatch_scale.data.writing.sources.store_bands import BandRule, store_bands
from maskmatch_scale.data.writing.sources.store_image import Stored, store_image


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
        bands: how images with bands are read; None: images are plain ones.
    """

    root: str
    rules: tuple[tuple[str, LabelRule], ...]
    max_side: int | None
    bands: BandRule | None = None

    def __call__(self, item: FileItem) -> EncodedSample:
        """Read, check and encode.

        Raises:
            BadSample: a file is missing, empty, unreadable or too large, or the label map does not fit the image.
        """
        path = str(Path(self.root, item.image))
        stored, known = self._stored(_read(path, "no_image"), path, item.label is not None)
        if item.label is None:
            return EncodedSample(item.key, stored.data, stored.extension)
        path = str(Path(self.root, item.label))
        data = _read(path, "no_label")
        rule = next(rule for end, rule in self.rules if item.label.endswith(end))
        values = rule.read(data, path)
        size = (values.shape[1], values.shape[0])
        if size != stored.original:
            (width, height), (own_width, own_height) = stored.original, size
            what = f"{own_width} × {own_height} px, but its image {item.image} has {width} × {height}"
            raise BadSample("label_size", f"{path}: {what}")
        if known is not None:
            values = np.where(known, values, np.uint8(IGNORE))
        if stored.size != stored.original:
            values = np.asarray(Image.fromarray(values).resize(stored.size, Image.Resampling.NEAREST))
        elif known is None and rule.keeps(data):
            return EncodedSample(item.key, stored.data, stored.extension, data)
        return EncodedSample(item.key, stored.data, stored.extension, encode_label(values))

    def _stored(self, data: bytes, path: str, labelled: bool) -> tuple[Stored, NDArray[np.bool_] | None]:
        """The image as it is stored, and which of its pixels have data, (H, W); None: all."""
        if self.bands is None:
            return store_image(data, path, labelled=labelled, max_side=self.max_side), None
        return store_bands(data, path, self.bands, max_side=self.max_side)


def _read(path: str, if_missing: str) -> bytes:
    """The bytes of a file; :class:`BadSample` with the reason `if_missing` if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(if_missing, f"{path}: cannot be read ({error.strerror})") from None
