"""TIFFs and GeoTIFFs, read in parts by rasterio, so that their size does not matter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.images.band_pages import fill_without_data, mapped
from maskmatch_scale.data.images.bands import shown_names
from maskmatch_scale.data.images.file_bands import RGB_FILES, FileBands
from maskmatch_scale.data.images.image import TWELVE_BITS, refuse_dark
from maskmatch_scale.data.images.opening import TIFF_STARTS, bad
from maskmatch_scale.data.images.raster import Raster, readable, transparency_of, valid_pixels
from maskmatch_scale.extras import needs

if TYPE_CHECKING:
    from torch import Tensor

CACHE_MB = 256
"""Of decoded tiles, which GDAL keeps while neighbouring windows are read."""
_PIECE_PX = 1 << 24
"""Pixels that are looked at together where all of an image must be."""


def has_rasterio(wanted_for: str) -> Any:
    """The module rasterio.

    Args:
        wanted_for: what cannot be done without it, for the message.

    Raises:
        UserError: it is not installed.
    """
    return needs("rasterio", "rasterio", "geo", wanted_for)


def is_tiff(start: bytes) -> bool:
    """Whether a file that begins like this is a TIFF."""
    return start.startswith(TIFF_STARTS)


@contextmanager
def open_tiff(data: bytes | Path, name: str, bands: FileBands | None = None) -> Iterator[TiffImage]:
    """Open a TIFF while the body runs.

    Args:
        data: the file: its bytes or its path.
        name: of it, for messages.
        bands: the channels of the model; None: RGB.

    Raises:
        BadSample: ``not_an_image``: it is no TIFF, is damaged, has no channels of 8 or 16 bits, or other bands.
    """
    rasterio = has_rasterio(name)
    with ExitStack() as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        opened.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE_MB))
        with readable(name, "TIFF"):
            if isinstance(data, bytes):
                dataset = opened.enter_context(rasterio.MemoryFile(data)).open(driver="GTiff")
            else:
                dataset = rasterio.open(data, driver="GTiff")
            opened.enter_context(dataset)
            bands = bands or RGB_FILES
            if bands.bands:
                pages = dataset.subdatasets if dataset.count == 1 and len(dataset.subdatasets) > 1 else []
                datasets = [opened.enter_context(rasterio.open(page)) for page in pages] or [dataset]
                image: TiffImage = BandsTiff(datasets, name, bands)
            else:
                image = TiffImage(dataset, name, bands)
        yield image


class TiffImage:
    """An image that is read from its file in parts, as :mod:`maskmatch_scale.evaluation.inference` asks for them.

    Of several channels those that are called red, green and blue are taken, or else the first three. One channel is
    repeated, or looked up in its palette. Of 16 bits the upper 8 are taken, as from other formats. It is not turned by
    the tag `Orientation`, since its maps have its georeference.

    Args:
        dataset: rasterio's, open for reading.
        name: of the file, for messages.
        bands: may say which channels are red, green and blue.

    Raises:
        BadSample: ``not_an_image``: it has channels of another type, or another number than ``bands`` says.
    """

    unused: str | None = None
    """A line on channels that are not used, although they are no transparency, and nobody said so."""

    def __init__(self, dataset: Any, name: str, bands: FileBands) -> None:
        self.dataset, self._name = dataset, name
        kinds = set(dataset.dtypes)
        if kinds not in ({"uint8"}, {"uint16"}):
            what = f"a TIFF of {', '.join(sorted(kinds))}; scale it to 8 bits: gdal_translate -ot Byte -scale IN OUT"
            raise bad("not_an_image", name, what)
        self._bits = 16 if kinds == {"uint16"} else 8
        with readable(name, "TIFF"):
            self._transparency = transparency_of(dataset)
        if bands.given is not None:
            self._channels = [place + 1 for place in bands.places(dataset.count, dataset.descriptions, name)]
        else:
            self._channels = _rgb_channels(dataset, name)
            self.unused = _unused(dataset.count, self._channels, self._transparency, name)
        self._white_is_zero = dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        self._palette = _palette(dataset, self._white_is_zero) if len(self._channels) == 1 else None
        if self._bits == 16:
            self._refuse_dark()

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width."""
        return self.dataset.height, self.dataset.width

    def read(self, rows: slice, columns: slice) -> Tensor:
        """Pixels of a part: uint8 (3, rows, columns).

        Raises:
            BadSample: ``not_an_image``: this part of the file is damaged.
        """
        import torch  # which processes that write shards do not need

        return torch.from_numpy(self.planes(rows, columns))

    def planes(self, rows: slice, columns: slice) -> NDArray[np.uint8]:
        """Likewise, as an array."""
        return self._eight_bits(self._stored(rows, columns))

    def valid(self, rows: slice, columns: slice | None = None) -> NDArray[np.bool_] | None:
        """Which pixels of some rows have data: (rows, columns), of all columns by default; None: all of the image have,
        see :func:`maskmatch_scale.data.images.raster.valid_pixels`.
        """
        window, bands = self._window(rows, columns or slice(0, self.size_px[1])), [n - 1 for n in self._channels]
        with readable(self._name, "TIFF"):
            return valid_pixels([self.dataset], bands, self._transparency, window=window)

    @property
    def is_jpeg(self) -> bool:
        """Whether its pixels were compressed as JPEG, and so have lost details already."""
        return self.dataset.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION", "") in ("JPEG", "YCbCr JPEG")

    @property
    def may_lack_data(self) -> bool:
        """Whether some pixels may have no data."""
        return self.valid(slice(0, 1)) is not None

    def shrunk(self, height: int, width: int) -> Image.Image:
        """The image in another size, RGB: the mean of the pixels that fall together."""
        resampling = has_rasterio(self._name).enums.Resampling
        how = resampling.average if self._palette is None else resampling.nearest
        with readable(self._name, "TIFF"):
            stored = self.dataset.read(self._channels, out_shape=(len(self._channels), height, width), resampling=how)
        return Image.fromarray(np.ascontiguousarray(self._eight_bits(stored).transpose(1, 2, 0)))

    @property
    def georeference(self) -> dict[str, Any]:
        """Where the image is, as arguments of `rasterio.open` for a file of the same size."""
        points, system = self.dataset.gcps
        where = {"gcps": points, "crs": system} if points else {"crs": self.dataset.crs}
        if not points and not self.dataset.transform.is_identity:
            where["transform"] = self.dataset.transform
        return where

    def _window(self, rows: slice, columns: slice) -> Any:
        return has_rasterio(self._name).windows.Window.from_slices(rows, columns)

    def _stored(self, rows: slice, columns: slice) -> NDArray[Any]:
        with readable(self._name, "TIFF"):
            stored: NDArray[Any] = self.dataset.read(self._channels, window=self._window(rows, columns))
        return stored

    def _eight_bits(self, stored: NDArray[Any]) -> NDArray[np.uint8]:
        """uint8 (3, h, w) of the channels (1 or 3, h, w) as they are stored."""
        if self._palette is not None:
            return np.ascontiguousarray(self._palette[stored[0]].transpose(2, 0, 1))
        eight = (stored >> 8).astype(np.uint8) if self._bits == 16 else stored
        eight = 255 - eight if self._white_is_zero else eight
        return np.repeat(eight, 3, axis=0) if len(eight) == 1 else eight

    def _refuse_dark(self) -> None:
        """Refuse 12-bit data in 16 bits, as the decoder of other formats does; this reads the whole file once.

        Pixels without data do not count: they are often 65535.
        """
        height, width = self.size_px
        step, largest = max(1, _PIECE_PX // width), 0
        for top in range(0, height, step):
            rows = slice(top, min(top + step, height))
            stored, valid = self._stored(rows, slice(0, width)), self.valid(rows)
            largest = max(largest, int(stored.max(initial=0, where=True if valid is None else valid)))
            if largest >= TWELVE_BITS:
                break
        refuse_dark(largest, self._name)


class BandsTiff(TiffImage):
    """An image of a model whose channels are bands: their stored values, mapped by their ranges as shards are.

    Args:
        datasets: rasterio's, open for reading; several are the pages of a file of one band each.
        name: of the file, for messages.
        bands: the channels.

    Raises:
        BadSample: ``not_an_image``: it has bands of another type, or it cannot be told which are the channels.
    """

    def __init__(self, datasets: Sequence[Any], name: str, bands: FileBands) -> None:
        self.dataset, self._name = datasets[0], name
        self._raster = Raster(datasets, name)
        self._places = bands.places(self._raster.count, self._raster.descriptions, name)
        self._bands = bands

    def planes(self, rows: slice, columns: slice) -> NDArray[np.uint8]:
        """Pixels of a part: uint8 (C, rows, columns)."""
        window = rows, columns
        stored, valid = self._raster.read(self._places, window=window), self._raster.valid(self._places, window=window)
        return mapped(fill_without_data(stored, valid, self._bands.bands), self._bands.bands)

    def valid(self, rows: slice, columns: slice | None = None) -> NDArray[np.bool_] | None:
        """Which pixels of a part have data, as when shards are written: (rows, columns); None: all have."""
        return self._raster.valid(self._places, window=(rows, columns or slice(0, self.size_px[1])))

    def shrunk(self, height: int, width: int) -> Image.Image:
        """The image in another size: bands that are shown as red, green and blue. Some pixels are passed over."""
        channels = [self._bands.names.index(name) for name in shown_names(self._bands.names)]
        stored = self._raster.read([self._places[channel] for channel in channels], shape=(height, width))
        planes = mapped(stored, [self._bands.bands[channel] for channel in channels])
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


def _rgb_channels(dataset: Any, name: str) -> list[int]:
    """Numbers, from 1, of one channel or of three."""
    meant = {interpretation.name: number for number, interpretation in enumerate(dataset.colorinterp, start=1)}
    if "cyan" in meant:
        raise bad("not_an_image", name, "a TIFF in CMYK; convert it to RGB")
    if {"red", "green", "blue"} <= meant.keys():
        return [meant["red"], meant["green"], meant["blue"]]
    return [1] if dataset.count < 3 else [1, 2, 3]


def _unused(count: int, channels: list[int], transparency: int | None, name: str) -> str | None:
    """A line on channels of a file, of ``count``, that are left out and no transparency; None: there are none."""
    left = [number for number in range(1, count + 1) if number - 1 != transparency and number not in channels]
    if not left:
        return None
    taken = "channel 1 is taken as grey" if len(channels) == 1 else f"channels {channels} are red, green and blue"
    return f"{name}: {taken}, {left} are not used; --bands names those of your files, such as red,green,blue,-"


def _palette(dataset: Any, white_is_zero: bool) -> NDArray[np.uint8] | None:
    """uint8 (256, 3), by stored value; None if the values are grey levels as they are."""
    colours = np.zeros((256, 3), np.uint8)
    if dataset.colorinterp[0].name == "palette":
        for value, colour in dataset.colormap(1).items():
            colours[value] = colour[:3]
        return colours
    bits = int(dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
    if bits >= 8:
        return None
    levels = np.linspace(0, 255, 1 << bits).round().astype(np.uint8)
    levels = levels[::-1] if white_is_zero else levels
    colours[: 1 << bits] = levels[:, None]
    return colours
