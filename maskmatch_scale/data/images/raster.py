"""Rasters of any number of bands, read by rasterio with all their bits: TIFF, GeoTIFF and PNG."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.images.opening import PNG, bad, said, start_of
from maskmatch_scale.errors import UserError
from maskmatch_scale.extras import needs

_CACHE_MB = 64
"""Of decoded blocks, which GDAL keeps."""
_BLOCK_PX = 1 << 28
"""Blocks of more pixels are refused: one is decoded whole."""
_WINDOWS, _WINDOW_PX = 4, 128
"""Of a band that may be transparency so many windows along each side are looked at, and their side."""
_ENDS = 0.98
"""Share of its values that are 0 or the largest one: edges may be soft."""
KINDS = ("uint8", "uint16", "int16")
"""Types of values that shards hold."""

Window = tuple[slice, slice]
"""Rows and columns, px."""


class Raster:
    """An image whose bands are read from its file: those of one raster, or one a page of a TIFF of grey pages.

    Args:
        datasets: rasterio's, open for reading; several are pages, of one band each.
        name: of the file, for messages.

    Raises:
        BadSample: ``not_an_image``: bands of a type that is not read, a palette, or pages of different sizes.
    """

    def __init__(self, datasets: Sequence[Any], name: str) -> None:
        self._datasets, self._name = datasets, name
        first = datasets[0]
        self.size_px: tuple[int, int] = first.height, first.width
        """Height and width."""
        self.count = first.count if len(datasets) == 1 else len(datasets)
        """Number of bands."""
        for number, page in enumerate(datasets, start=1):
            if (page.height, page.width) != self.size_px:
                what = f"page {number}: {page.height} × {page.width} px, page 1 {first.height} × {first.width}"
                raise bad("not_an_image", name, f"{what}; resample all bands to one size")
            if any(height * width > _BLOCK_PX for height, width in page.block_shapes):
                raise bad("not_an_image", name, "blocks of more than 2²⁸ px; write it with smaller tiles")
        kinds = {kind for page in datasets for kind in page.dtypes}
        if len(kinds) > 1 or not kinds <= set(KINDS):
            what = f"values of type {', '.join(sorted(kinds))}; 8 or 16 bits are read, floats and 32 bits are not"
            remedy = "scale them: gdal_translate -ot UInt16 -scale LOW HIGH 0 65535 IN OUT, all files alike"
            raise bad("not_an_image", name, f"{what}; {remedy}")
        self.kind = np.dtype(next(iter(kinds)))
        """Type of the values."""
        self.descriptions: tuple[str | None, ...] = tuple(text for page in datasets for text in page.descriptions)
        """What the file calls each band."""
        if first.colorinterp[0].name == "palette":
            raise bad("not_an_image", name, "a palette image, whose values are no measurements; convert it to RGB")

    def read(
        self, bands: Sequence[int], shape: tuple[int, int] | None = None, window: Window | None = None
    ) -> NDArray[Any]:
        """Values of bands, numbered from 0: (bands, H, W) of type `kind`.

        Args:
            bands: which.
            shape: (H, W) of what is returned, made by leaving pixels out; None: all pixels.
            window: rows and columns that are read; None: all.

        Raises:
            BadSample: ``not_an_image``: the file is damaged.
        """
        part = _part(shape, window)
        with readable(self._name):
            if len(self._datasets) == 1:
                if shape is not None:
                    part["out_shape"] = (len(bands), *shape)
                values: NDArray[Any] = self._datasets[0].read([band + 1 for band in bands], **part)
                return values
            return np.stack([self._datasets[band].read(1, **part) for band in bands])

    def valid(
        self, bands: Sequence[int], shape: tuple[int, int] | None = None, window: Window | None = None
    ) -> NDArray[np.bool_] | None:
        """Which pixels have data, (H, W); None: all have, see :func:`valid_pixels`. Arguments as for :meth:`read`."""
        with readable(self._name):
            return valid_pixels(self._datasets, bands, self._transparency, **_part(shape, window))

    @cached_property
    def _transparency(self) -> int | None:
        return transparency_of(self._datasets[0])


def valid_pixels(
    datasets: Sequence[Any], bands: Sequence[int], transparency: int | None, **part: Any
) -> NDArray[np.bool_] | None:
    """Which pixels of an image have data, bool (H, W); None: all have, as the file's own header says.

    A mask says it, else a band of transparency that is not wanted itself, else a value `nodata` that all bands of the
    file have.

    Args:
        datasets: rasterio's, as for :class:`Raster`.
        bands: that are wanted, numbered from 0.
        transparency: see :func:`transparency_of`.
        part: further arguments of rasterio's `read`.
    """
    first = datasets[0]
    flags = {flag.name for flag in first.mask_flag_enums[0]}
    if "per_dataset" in flags and "alpha" not in flags:
        return np.asarray(first.dataset_mask(**part) > 0)
    if transparency is not None and transparency not in bands:
        return np.asarray(first.read(transparency + 1, **part) > 0)
    if first.nodata is None:
        return None
    known: NDArray[np.bool_] | None = None
    for page in datasets:
        for band in range(page.count):
            values = page.read(band + 1, **part)
            has_data = values != first.nodata
            known = has_data if known is None else known | has_data
    return known


def transparency_of(dataset: Any) -> int | None:
    """The number, from 0, of the band that says where a file has data; None: there is none.

    GDAL calls the fourth band of any 8-bit TIFF of red, green and blue so, even if it is near infrared. So all but a
    few of the values in parts of the band must be 0 or the largest one.

    Args:
        dataset: rasterio's, open for reading.
    """
    for number, meaning in enumerate(dataset.colorinterp):
        if meaning.name == "alpha":
            values = _some_values(dataset, number)
            is_end = (values == 0) | (values == values.max())
            return number if is_end.mean() >= _ENDS else None
    return None


def _some_values(dataset: Any, band: int) -> NDArray[Any]:
    """Values (n,) of windows of a band, evenly spread."""
    rows, columns = (
        sorted({max(0, min(side * place // _WINDOWS, side - _WINDOW_PX)) for place in range(_WINDOWS)})
        for side in (dataset.height, dataset.width)
    )
    windows = [
        ((top, min(top + _WINDOW_PX, dataset.height)), (left, min(left + _WINDOW_PX, dataset.width)))
        for top in rows
        for left in columns
    ]
    return np.concatenate([dataset.read(band + 1, window=window).ravel() for window in windows])


def _part(shape: tuple[int, int] | None, window: Window | None) -> dict[str, Any]:
    """Arguments of rasterio for reading a part."""
    part: dict[str, Any] = {} if shape is None else {"out_shape": shape}
    if window is not None:
        part["window"] = tuple((along.start, along.stop) for along in window)
    return part


@contextmanager
def open_raster(data: bytes | Path, name: str) -> Iterator[Raster]:
    """Open a TIFF or PNG while the body runs.

    Args:
        data: the file: its bytes or its path.
        name: of it, for messages.

    Raises:
        BadSample: ``not_an_image``: another format, damaged, or see :class:`Raster`.
        UserError: rasterio is not installed.
    """
    rasterio: Any = needs("rasterio", "rasterio", "geo", f"{name}: bands")
    with ExitStack() as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        opened.enter_context(rasterio.Env(GDAL_CACHEMAX=_CACHE_MB, GDAL_PAM_ENABLED="NO"))
        with readable(name):
            driver = "PNG" if start_of(data).startswith(PNG) else "GTiff"
            where = str(data)
            if isinstance(data, bytes):
                where = opened.enter_context(rasterio.MemoryFile(data)).name
            dataset = opened.enter_context(rasterio.open(where, driver=driver))
            datasets = [dataset]
            if dataset.count == 1 and len(dataset.subdatasets) > 1:
                datasets = [opened.enter_context(rasterio.open(page)) for page in dataset.subdatasets]
            raster = Raster(datasets, name)
        yield raster


@contextmanager
def readable(name: str, what: str = "raster") -> Iterator[None]:
    """Turn what rasterio says of a damaged file into a :class:`BadSample`; ``what`` it was to be, for the message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of GDAL's C++ as well
        raise bad("not_an_image", name, f"not a readable {what} ({said(error)}); replace it") from None
