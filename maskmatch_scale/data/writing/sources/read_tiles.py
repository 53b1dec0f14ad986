"""From a tile of a huge image to its sample: what a process of the writer does.

TIFFs are read in parts. Other formats are decoded whole, once for all tiles that a process makes of an image: tiles of
an image follow each other, and a process keeps the last one open.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.band_pages import encode_pages
from maskmatch_scale.data.images.encode import encode_label
from maskmatch_scale.data.images.image import decode_large, orientation_alone
from maskmatch_scale.data.images.label import decode_raw_values
from maskmatch_scale.data.images.opening import JPEG, file_faults, is_stored, open_any, open_stored, start_of
from maskmatch_scale.data.images.raster import Raster, Window
from maskmatch_scale.data.images.tiff import TiffImage, is_tiff, open_tiff
from maskmatch_scale.data.images.tiff_labels import open_tiff_values
from maskmatch_scale.data.writing.protocol import EncodedSample, LeftOut
from maskmatch_scale.data.writing.sources.annotations import AnnotationRule
from maskmatch_scale.data.writing.sources.classes import IGNORE
from maskmatch_scale.data.writing.sources.plain_tiff import refuse_lost_bands
from maskmatch_scale.data.writing.sources.read_files import FileItem, ReadFiles, check_label_size, refuse_flipped
from maskmatch_scale.data.writing.sources.store_bands import BandRule, Planes, open_bands, read_pages
from maskmatch_scale.data.writing.sources.store_image import encode_tile
from maskmatch_scale.data.writing.sources.tiles import TileItem

_ALPHA = ("LA", "PA", "La", "RGBA", "RGBa")
"""Pillow's modes with transparency."""


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
            return _kept.opened(self.whole, item.file).tile(item)
        finally:
            if item.is_last:
                _kept.close()


class _Image(Protocol):
    """An image of which parts are stored."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width."""

    def read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """A part as :meth:`encode` takes it; and bool (h, w), which of its pixels have data, or None: all."""

    def encode(self, pixels: NDArray[Any]) -> tuple[bytes, str]:
        """A part as it is stored, and its extension."""


class _Tiff:
    """A TIFF that is stored as a plain image."""

    def __init__(self, image: TiffImage) -> None:
        self._image, self.size_px = image, image.size_px

    def read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        return self._image.planes(*window).transpose(1, 2, 0), self._image.valid(*window)

    def encode(self, pixels: NDArray[Any]) -> tuple[bytes, str]:
        return encode_tile(pixels, is_jpeg=self._image.is_jpeg)


class _Whole:
    """An image of another format, decoded. Its tiles keep its orientation."""

    def __init__(self, path: Path, start: bytes) -> None:
        name = str(path)
        self._pixels = decode_large(path, name, exif_orientation=False).transpose(1, 2, 0)
        self.size_px: tuple[int, int] = self._pixels.shape[0], self._pixels.shape[1]
        self._is_jpeg = start.startswith(JPEG)
        opener = open_stored if is_stored(start) else open_any
        with file_faults(name, "not_an_image", "image"), opener(path) as header:
            self._exif = orientation_alone(header)
            self._alpha = np.asarray(header.getchannel("A")) if header.mode in _ALPHA else None

    def read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        return self._pixels[window], None if self._alpha is None else self._alpha[window] > 0

    def encode(self, pixels: NDArray[Any]) -> tuple[bytes, str]:
        return encode_tile(pixels, is_jpeg=self._is_jpeg, exif=self._exif)


class _Bands:
    """An image that is stored with all its bands."""

    def __init__(self, image: Raster | Planes, name: str, rule: BandRule) -> None:
        self._image, self._name, self._rule = image, name, rule
        self.size_px = image.size_px

    def read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        return read_pages(self._image, self._name, self._rule, window)

    def encode(self, pixels: NDArray[Any]) -> tuple[bytes, str]:
        return encode_pages(list(pixels)), "tif"


@dataclass(frozen=True)
class _Opened:
    """An image and its label map, open.

    Attributes:
        image: which.
        values: uint8 (h, w): class values of a part; None: there is no label map.
        ignores_unknown: whether pixels without data are ignored in the label map, as for images of bands that are not
            cut.
    """

    image: _Image
    values: Callable[[Window], NDArray[np.uint8]] | None
    ignores_unknown: bool

    def tile(self, item: TileItem) -> EncodedSample:
        """The sample of a tile.

        Raises:
            BadSample: see :class:`ReadTiles`, as for :class:`LeftOut`.
        """
        pixels, known = self.image.read(item.window)
        if known is not None and not known.any():
            raise LeftOut("no_data", f"{item.key}: no pixel has data")
        label = None
        if self.values is not None:
            values = self.values(item.window)
            if self.ignores_unknown and known is not None:
                values = np.where(known, values, np.uint8(IGNORE))
            if (values == IGNORE).all():
                raise LeftOut("all_ignored", f"{item.key}: all pixels of its label map are ignored")
            label = encode_label(np.ascontiguousarray(values))
        return EncodedSample(item.key, *self.image.encode(pixels), label)


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
    """Open the files of an item until ``stack`` is closed."""
    image = _open_image(Path(files.root, item.image), files.bands, stack)
    values = None
    if item.label is not None:
        name = files.label_name(item)
        size, values = _open_label(files, item.label, name, stack)
        if files.annotations is not None and not isinstance(image, _Tiff):
            refuse_flipped(Path(files.root, item.image), name, image.size_px)
        check_label_size(name, size, item.image, image.size_px)
    return _Opened(image, values, files.bands is not None)


def _open_image(path: Path, bands: BandRule | None, stack: ExitStack) -> _Image:
    name = str(path)
    try:
        start = start_of(path)
    except OSError as error:
        raise BadSample("no_image", f"{name}: cannot be read ({error.strerror})") from None
    if bands is not None:
        return _Bands(stack.enter_context(open_bands(path, name, bands.names)), name, bands)
    if not is_tiff(start):
        return _Whole(path, start)
    refuse_lost_bands(path, name)
    return _Tiff(stack.enter_context(open_tiff(path, name)))


def _open_label(
    files: ReadFiles, label: str, name: str, stack: ExitStack
) -> tuple[tuple[int, ...], Callable[[Window], NDArray[np.uint8]]]:
    """Height and width of a label map, and what reads class values of a part."""
    rule = files.rule_of(label)
    if isinstance(rule, AnnotationRule):
        drawn = rule.read(files.label_data(label), name)
        return drawn.shape[:2], lambda window: drawn[window]
    path = Path(name)
    if path.is_file() and is_tiff(start_of(path)):
        tiff = stack.enter_context(open_tiff_values(path, name))
        if tiff is not None:
            return tiff.size_px, lambda window: rule.values(tiff.read(*window), name, window)
    raw = decode_raw_values(files.label_data(label), name)
    return raw.shape[:2], lambda window: rule.values(raw[window], name, window)
