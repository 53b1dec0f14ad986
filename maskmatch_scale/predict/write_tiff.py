"""Maps of one channel as TIFFs with the georeference of their image, written in rows by rasterio."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.predict.tiff import has_rasterio

TILE_PX = 256
"""Side of a tile."""


@contextmanager
def write_tiff(
    path: Path,
    size_px: tuple[int, int],
    georeference: dict[str, Any],
    *,
    palette: Sequence[tuple[int, int, int]] | None = None,
    no_data: int | None = None,
) -> Iterator[TiffRows]:
    """Write a TIFF of one uint8 channel, tiled and compressed, row by row.

    Args:
        path: file to write.
        size_px: height and width.
        georeference: see :attr:`TiffImage.georeference`.
        palette: RGB by value, or None for grey.
        no_data: value of pixels that have no data.

    Yields:
        What takes its rows.
    """
    rasterio = has_rasterio(str(path))
    height, width = size_px
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            height=height,
            width=width,
            count=1,
            dtype="uint8",
            tiled=True,
            blockxsize=TILE_PX,
            blockysize=TILE_PX,
            compress="deflate",
            bigtiff="if_safer",
            nodata=no_data,
            **georeference,
        ) as dataset:
            if palette is not None:
                dataset.write_colormap(1, {value: (*colour, 255) for value, colour in enumerate(palette)})
            rows = TiffRows(dataset)
            yield rows
            rows.flush()


class TiffRows:
    """Writes rows in whole tiles: a tile that is written in parts is compressed, and takes room, each time.

    Args:
        dataset: rasterio's, open for writing.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._done = 0
        self._waiting: list[NDArray[np.uint8]] = []

    def add(self, rows: NDArray[np.uint8]) -> None:
        """Take the next rows: uint8 (h, W)."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= TILE_PX:
            every = np.concatenate(self._waiting)
            whole = len(every) // TILE_PX * TILE_PX
            self._write(every[:whole])
            self._waiting = [every[whole:].copy()]

    def flush(self) -> None:
        """Write what is left."""
        left = np.concatenate(self._waiting) if self._waiting else np.empty((0, 0), np.uint8)
        if len(left):
            self._write(left)

    def _write(self, rows: NDArray[np.uint8]) -> None:
        window = ((self._done, self._done + len(rows)), (0, rows.shape[1]))
        self._dataset.write(rows, 1, window=window)
        self._done += len(rows)
