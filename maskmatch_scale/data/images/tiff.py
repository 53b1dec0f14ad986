"""TIFFs and GeoTIFFs, read in parts by rasterio, so that their size does not matter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.images.image import TWELVE_BITS, refuse_dark
from maskmatch_scale.data.images.opening import TIFF_STARTS, bad, said
from maskmatch_scale.errors import UserError
from maskmatch_scale.extras import needs

if TYPE_CHECKING:
    from torch import Tensor

_CACHE_MB = 256
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
def open_tiff(data: bytes | Path, name: str) -> Iterator[TiffImage]:
    """Open a TIFF while the body runs.

    Args:
        data: the file: its bytes or its path.
        name: of it, for messages.

    Raises:
        BadSample: ``not_an_image``: it is no TIFF, is damaged, or has no channels of 8 or 16 bits.
    """
    rasterio = has_rasterio(name)
    with ExitStack() as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        opened.enter_context(rasterio.Env(GDAL_CACHEMAX=_CACHE_MB))
        with _readable(name):
            if isinstance(data, bytes):
                dataset = opened.enter_context(rasterio.MemoryFile(data)).open(driver="GTiff")
            else:
                dataset = rasterio.open(data, driver="GTiff")
            opened.enter_context(dataset)
            image = TiffImage(dataset, name)
        yield image


class TiffImage:
    """An image that is read from its file in parts, as :mod:`maskmatch_scale.evaluation.inference` asks for them.

    Of several channels those that are called red, green and blue are taken, or else the first three. One channel is
    repeated, or looked up in its palette. Of 16 bits the upper 8 are taken, as from other formats. It is not turned by
    the tag `Orientation`, since its maps have its georeference.

    Args:
        dataset: rasterio's, open for reading.
        name: of the file, for messages.

    Raises:
        BadSample: ``not_an_image``: it has channels of another type.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self._name = dataset, name
        kinds = set(dataset.dtypes)
        if kinds not in ({"uint8"}, {"uint16"}):
            what = f"a TIFF of {', '.join(sorted(kinds))}; scale it to 8 bits: gdal_translate -ot Byte -scale IN OUT"
            raise bad("not_an_image", name, what)
        self._bits = 16 if kinds == {"uint16"} else 8
        self._channels = _rgb_channels(dataset, name)
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
        as the file's own header says.
        """
        if all("all_valid" in (flag.name for flag in flags) for flags in self.dataset.mask_flag_enums):
            return None
        with _readable(self._name):
            mask = self.dataset.dataset_mask(window=self._window(rows, columns or slice(0, self.size_px[1])))
        return np.asarray(mask > 0)

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
        with _readable(self._name):
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
        with _readable(self._name):
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


class TiffValues:
    """A label map of a data set that is read from its TIFF in parts.

    Args:
        dataset: rasterio's, open for reading: of one channel of 8 or 16 bits, or of RGB colours of 8.
        name: of the file, for messages.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self._name = dataset, name

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width."""
        return self.dataset.height, self.dataset.width

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """What :func:`~maskmatch_scale.data.images.label.decode_raw_values` returns, of a part: uint8 or uint16
        (rows, columns), or uint8 (rows, columns, 3) of colours.

        Raises:
            BadSample: ``not_a_label``: this part of the file is damaged.
        """
        window = has_rasterio(self._name).windows.Window.from_slices(rows, columns)
        try:
            if self.dataset.count == 1:
                return np.asarray(self.dataset.read(1, window=window))
            return np.ascontiguousarray(self.dataset.read([1, 2, 3], window=window).transpose(1, 2, 0))
        except Exception as error:  # of GDAL's C++ as well
            raise bad("not_a_label", self._name, f"not a readable label map ({said(error)}); replace it") from None


@contextmanager
def open_tiff_values(path: Path, name: str) -> Iterator[TiffValues | None]:
    """Open a label map while the body runs; None if it is no TIFF whose numbers GDAL reads as they are: then it has to
    be decoded whole.
    """
    rasterio = has_rasterio(name)
    with ExitStack() as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        opened.enter_context(rasterio.Env(GDAL_CACHEMAX=_CACHE_MB))
        try:
            dataset = opened.enter_context(rasterio.open(path, driver="GTiff"))
        except Exception:  # whoever decodes it whole says what is wrong
            yield None
            return
        kinds = (dataset.count, *sorted(set(dataset.dtypes)))
        structure = dataset.tags(ns="IMAGE_STRUCTURE") | dataset.tags(1, ns="IMAGE_STRUCTURE")
        is_plain = not {"MINISWHITE", "NBITS"} & structure.keys()
        known = ((1, "uint8"), (1, "uint16"), (3, "uint8"), (4, "uint8"))
        yield TiffValues(dataset, name) if is_plain and kinds in known else None


def _rgb_channels(dataset: Any, name: str) -> list[int]:
    """Numbers, from 1, of one channel or of three."""
    meant = {interpretation.name: number for number, interpretation in enumerate(dataset.colorinterp, start=1)}
    if "cyan" in meant:
        raise bad("not_an_image", name, "a TIFF in CMYK; convert it to RGB")
    if {"red", "green", "blue"} <= meant.keys():
        return [meant["red"], meant["green"], meant["blue"]]
    return [1] if dataset.count < 3 else [1, 2, 3]


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


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what rasterio says of a damaged file into a :class:`BadSample`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of GDAL's C++ as well
        raise bad("not_an_image", name, f"not a readable TIFF ({said(error)}); replace it") from None
