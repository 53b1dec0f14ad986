"""Label maps that lie in TIFFs, read in parts by rasterio, so that their size does not matter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.images.opening import bad, said
from maskmatch_scale.data.images.tiff import CACHE_MB, has_rasterio


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
        opened.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE_MB))
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
