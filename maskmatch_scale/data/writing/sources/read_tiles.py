"""From a tile of a huge image to its sample: what a process of the writer does.

TIFFs are read in parts. Other formats are decoded whole, once for all tiles that a process makes of an image: tiles of
an image follow each other, and a process keeps the last one open.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.encode import encode_label
from maskmatch_scale.data.images.image import decode_large, orientation_alone
from maskmatch_scale.data.images.label import decode_raw_values
from maskmatch_scale.data.images.opening import JPEG, file_faults, is_stored, open_any, open_stored, start_of
from maskmatch_scale.data.images.tiff import open_tiff, open_tiff_values
from maskmatch_scale.data.writing.protocol import EncodedSample, LeftOut
from maskmatch_scale.data.writing.sources.classes import IGNORE
from maskmatch_scale.data.writing.sources.read_files import FileItem, ReadFiles, check_label_size
from maskmatch_scale.data.writing.sources.store_image import encode_tile
from maskmatch_scale.data.writing.sources.tiles import TileItem, is_tiff

_ALPHA = ("LA", "PA", "La", "RGBA", "RGBa")
"""Pillow's modes with transparency."""

Window = tuple[slice, slice]
"""Rows and columns, px."""


@dataclass(frozen=True)
class ReadTiles:
    """From an item to its sample; picklable.

    Args:
        whole: makes the samples of images that are not cut.
    """

    whole: ReadFiles

    def __call__(self, item: FileItem | TileItem) -> EncodedSample:
        """Read, cut, check and encode.

        Raises:
            BadSample: as :class:`ReadFiles`.
            LeftOut: nothing in a tile is labelled, or none of it has data.
        """
        if isinstance(item, FileItem):
            return self.whole(item)
        try:
            return _tile(_kept.opened(self.whole, item.file), item)
        finally:
            if item.is_last:
                _kept.close()


@dataclass(frozen=True)
class _Opened:
    """An image and its label map, open.

    Attributes:
        pixels: uint8 (h, w, 3) of a window.
        valid: bool (h, w): which pixels of a window have data; None: all.
        values: uint8 (h, w): class values of a window; None: there is no label map.
        is_jpeg: whether the image was compressed as JPEG.
        exif: its orientation, which its tiles keep.
    """

    pixels: Callable[[Window], NDArray[np.uint8]]
    valid: Callable[[Window], NDArray[np.bool_] | None]
    values: Callable[[Window], NDArray[np.uint8]] | None
    is_jpeg: bool
    exif: Image.Exif


def _tile(opened: _Opened, item: TileItem) -> EncodedSample:
    valid = opened.valid(item.window)
    if valid is not None and not valid.any():
        raise LeftOut("no_data", f"{item.key}: no pixel has data")
    label = None
    if opened.values is not None:
        values = opened.values(item.window)
        if (values == IGNORE).all():
            raise LeftOut("all_ignored", f"{item.key}: all pixels of its label map are ignored")
        label = encode_label(values)
    data, extension = encode_tile(opened.pixels(item.window), is_jpeg=opened.is_jpeg, exif=opened.exif)
    return EncodedSample(item.key, data, extension, label)


class _Kept:
    """The image that this process has open."""

    def __init__(self) -> None:
        self._of: tuple[ReadFiles, FileItem] | None = None
        self._found: _Opened | BadSample | None = None
        self._stack = ExitStack()

    def opened(self, files: ReadFiles, item: FileItem) -> _Opened:
        """The files of an item, opened if they are not the last ones.

        Raises:
            BadSample: they cannot be read, as it was said of their last tile, too.
        """
        if self._of != (files, item):
            self.close()
            try:
                self._found = _open(files, item, self._stack)
            except BadSample as fault:
                self._found = fault
            self._of = files, item
        if isinstance(self._found, BadSample):
            raise self._found
        assert self._found is not None
        return self._found

    def close(self) -> None:
        """Close it, and give its memory back."""
        self._of, self._found = None, None
        self._stack.close()


_kept = _Kept()


def _open(files: ReadFiles, item: FileItem, stack: ExitStack) -> _Opened:
    path = Path(files.root, item.image)
    name = str(path)
    is_jpeg, exif = False, Image.Exif()
    try:
        start, tiff = start_of(path), is_tiff(path)
    except OSError as error:
        raise BadSample("no_image", f"{name}: cannot be read ({error.strerror})") from None
    if tiff:
        image = stack.enter_context(open_tiff(path, name))
        is_jpeg, size = image.is_jpeg, image.size_px

        def pixels(window: Window) -> NDArray[np.uint8]:
            return np.ascontiguousarray(image.planes(*window).transpose(1, 2, 0))

        valid: Callable[[Window], NDArray[np.bool_] | None] = lambda window: image.valid(*window)  # noqa: E731
    else:
        planes = decode_large(path, name, exif_orientation=False)
        is_jpeg, size = start.startswith(JPEG), (planes.shape[1], planes.shape[2])
        opener = open_stored if is_stored(start) else open_any
        with file_faults(name, "not_an_image", "image"), opener(path) as header:
            exif = orientation_alone(header)
            alpha = np.asarray(header.getchannel("A")) if header.mode in _ALPHA else None

        def pixels(window: Window) -> NDArray[np.uint8]:
            return np.ascontiguousarray(planes[(slice(None), *window)].transpose(1, 2, 0))

        def valid(window: Window) -> NDArray[np.bool_] | None:
            return None if alpha is None else alpha[window] > 0

    if item.label is None:
        return _Opened(pixels, valid, None, is_jpeg, exif)
    label_size, values = _open_label(files, item.label, stack)
    check_label_size(str(Path(files.root, item.label)), label_size, item.image, size)
    return _Opened(pixels, valid, values, is_jpeg, exif)


def _open_label(
    files: ReadFiles, label: str, stack: ExitStack
) -> tuple[tuple[int, int], Callable[[Window], NDArray[np.uint8]]]:
    """Height and width of a label map, and what reads class values of a window."""
    rule, path = files.rule_of(label), Path(files.root, label)
    name = str(path)
    if path.is_file() and is_tiff(path) and (tiff := stack.enter_context(open_tiff_values(path, name))) is not None:
        return tiff.size_px, lambda window: rule.values(tiff.read(*window), name, window)
    raw = decode_raw_values(files.label_data(label), name)
    return raw.shape[:2], lambda window: rule.values(raw[window], name, window)
