"""Maps of one channel as TIFFs with the georeference of their image, written in rows by rasterio."""

from __future__ import annotations

import errno
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.images.tiff import has_rasterio

TILE_PX = 256
"""Side of a tile."""
_PROBE_BYTES = 1 << 20


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

    Raises:
        OSError: the file cannot be written. GDAL does not say why, and says nothing at all where what it had kept back
            cannot be written at the end; so the file is read again.
    """
    rasterio = has_rasterio(str(path))
    height, width = size_px
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with _written(path):
            dataset = rasterio.open(
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
            )
            if palette is not None:
                dataset.write_colormap(1, {value: (*colour, 255) for value, colour in enumerate(palette)})
        rows = TiffRows(dataset, path)
        try:
            yield rows
            rows.flush()
        finally:
            with _written(path):
                dataset.close()
        with _written(path), rasterio.open(path, driver="GTiff") as again:
            found = 0
            for top in range(0, height, TILE_PX):
                window = ((top, min(top + TILE_PX, height)), (0, width))
                found = zlib.crc32(again.read(1, window=window).data, found)
            if found != rows.checksum:
                raise ValueError("it does not hold what was written")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turn an error of GDAL into an OSError, whose reason is found by writing a little beside the file."""
    try:
        yield
    except Exception as error:
        probe, reason = path.with_name(f"{path.name}.probe"), errno.EIO
        try:
            with probe.open("wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as found:
            reason = found.errno or reason
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
        raise OSError(reason, os.strerror(reason), str(path)) from error


class TiffRows:
    """Writes rows in whole tiles: a tile that is written in parts is compressed, and takes room, each time.

    Args:
        dataset: rasterio's, open for writing.
        path: of its file.
    """

    def __init__(self, dataset: Any, path: Path) -> None:
        self._dataset, self._path = dataset, path
        self._done = 0
        self._waiting: list[NDArray[np.uint8]] = []
        self.checksum = 0
        """CRC-32 of all rows."""

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
        with _written(self._path):
            self._dataset.write(rows, 1, window=window)
        self.checksum = zlib.crc32(np.ascontiguousarray(rows).data, self.checksum)
        self._done += len(rows)
