"""Rasters of any number of bands, read by rasterio with all their bits: TIFF, GeoTIFF and PNG."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
        with _readable(self._name):
            if len(self._datasets) == 1:
                if shape is not None:
                    part["out_shape"] = (len(bands), *shape)
                values: NDArray[Any] = self._datasets[0].read([band + 1 for band in bands], **part)
                return values
            return np.stack([self._datasets[band].read(1, **part) for band in bands])

    def valid(
        self, bands: Sequence[int], shape: tuple[int, int] | None = None, window: Window | None = None
    ) -> NDArray[np.bool_] | None:
        """Which pixels have data, (H, W); None: all have, as the file's own header says.

        A mask, a value `nodata` that all bands have, or a band of transparency says it, unless that band is wanted
        itself: GDAL calls near infrared in an 8-bit TIFF so. Arguments as for :meth:`read`.
        """
        first = self._datasets[0]
        if any(first.colorinterp[band].name == "alpha" for band in bands if band < first.count):
            if first.nodata is None:
                return None
            known: NDArray[np.bool_] = (self.read(bands, shape, window) != first.nodata).any(axis=0)
            return known
        if all("all_valid" in (flag.name for flag in flags) for flags in first.mask_flag_enums):
            return None
        with _readable(self._name):
            mask = first.dataset_mask(**_part(shape, window))
        return np.asarray(mask > 0)


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
        with _readable(name):
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
def _readable(name: str) -> Iterator[None]:
    """Turn what rasterio says of a damaged file into a :class:`BadSample`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of GDAL's C++ as well
        raise bad("not_an_image", name, f"not a readable raster ({said(error)}); replace it") from None
