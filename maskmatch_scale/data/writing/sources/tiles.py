"""Tiles of huge images: where they lie, known before anything is rendered.

Tiles have one size. Where the last one of a row or column would reach over the edge, it is moved inwards, as the
windows of sliding inference are, and overlaps its neighbour. An image that is no larger than a tile stays whole.

Decision: docs/decisions/0085-tiles-are-cut-when-shards-are-written.md.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.opening import is_stored, open_any, open_stored, quiet, start_of
from maskmatch_scale.data.images.tiff import has_rasterio, is_tiff
from maskmatch_scale.data.pool import in_threads
from maskmatch_scale.data.writing.protocol import StreamItems
from maskmatch_scale.data.writing.sources.read_files import FileItem
from maskmatch_scale.errors import UserError
from maskmatch_scale.progress import progress_of

SMALLEST_TILE, LARGEST_TILE = 16, 10_000
"""Sides in px. A tile of the largest has as many pixels as training reads by default, and fits into a WebP."""

_KEY_OF_TILE = re.compile(r"(.+)_y\d{6,}_x\d{6,}")


class TileItem(NamedTuple):
    """A tile of one sample's files."""

    file: FileItem
    top: int
    left: int
    height: int
    """In px, as is the width."""
    width: int
    is_last: bool
    """Whether no other tile of this image follows."""

    @property
    def key(self) -> str:
        """Key of the image, and where its upper left pixel is in it."""
        return f"{self.file.key}_y{self.top:06d}_x{self.left:06d}"

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        tile_px: side of a tile.
        overlap_px: how far tiles overlap their neighbours; 0 ≤ overlap < tile.
    """

    tile_px: int
    overlap_px: int = 0

    def starts(self, side: int) -> list[int]:
        """Where tiles begin along a side of so many px. Every pixel is in one of them."""
        if side <= self.tile_px:
            return [0]
        last = side - self.tile_px
        return [*range(0, last, self.tile_px - self.overlap_px), last]

    def cut(self, file: FileItem, size: tuple[int, int] | None) -> list[FileItem | TileItem]:
        """The tiles of an image of a height and width in px, row by row; the image itself if it needs none."""
        if size is None or max(size) <= self.tile_px:  # an image whose size is unknown is refused when it is read
            return [file]
        tops, lefts = map(self.starts, size)
        height, width = (min(side, self.tile_px) for side in size)
        last = (tops[-1], lefts[-1])
        return [TileItem(file, top, left, height, width, (top, left) == last) for top in tops for left in lefts]


def tiling_of(tile: int | None, overlap: int | None, max_side: int | None) -> Tiling | None:
    """The tiling of the options `--tile` and `--overlap`; None without them.

    Raises:
        UserError: they do not fit together, or not to `--max-side`.
    """
    if tile is None:
        if overlap is not None:
            raise UserError(f"--overlap {overlap}: only tiles overlap; give --tile PX too, or leave it out")
        return None
    if not SMALLEST_TILE <= tile <= LARGEST_TILE:
        raise UserError(f"--tile {tile}: it must be {SMALLEST_TILE} to {LARGEST_TILE} px")
    if not 0 <= (overlap or 0) < tile:
        raise UserError(f"--overlap {overlap}: it must be at least 0 and less than --tile {tile}")
    if max_side is not None:
        raise UserError(f"--tile {tile} with --max-side {max_side}: an image is cut or shrunk; leave one of them out")
    return Tiling(tile, overlap or 0)


def is_named_tiff(path: str) -> bool:
    """Whether a file has the name of a TIFF; what it holds may differ."""
    return path.lower().endswith((".tif", ".tiff"))


def cut_streams(
    streams: Mapping[str, StreamItems], root: Path, tiling: Tiling, *, threads: int, progress: bool
) -> Mapping[str, StreamItems]:
    """The streams with tiles in place of images, those of an image one after the other. It reads all images' headers.

    Args:
        streams: of :class:`FileItem`.
        root: what their paths are relative to.
        tiling: how they are cut.
        threads: that read.
        progress: whether to report on stderr.

    Raises:
        DataError: an image would have the key of another one's tile.
        UserError: there are TIFFs, which need rasterio, and it is not installed.
    """
    files: list[FileItem] = [item for stream in streams.values() for item in stream.items]
    tiff = next((file.image for file in files if is_named_tiff(file.image)), None)
    sizes = []
    with (
        warnings.catch_warnings(),
        progress_of("sizes of images", len(files), unit="files", wanted=progress, elsewhere="lines if slow") as advance,
    ):
        if tiff is not None:
            _without_warnings(tiff)
        for size in in_threads(partial(_size, root), files, threads):
            sizes.append(size)
            advance()
    found, numbers = {}, iter(sizes)
    for name, stream in streams.items():
        cuts = [tiling.cut(file, next(numbers)) for file in stream.items]
        _refuse_equal_keys(cuts)
        found[name] = StreamItems(stream.labelled, [item for cut in cuts for item in cut])
    return found


def _without_warnings(wanted_for: str) -> None:
    """Say nothing of TIFFs without a georeference; :class:`UserError` if there is no rasterio."""
    warnings.simplefilter("ignore", has_rasterio(f"--tile and {wanted_for}").errors.NotGeoreferencedWarning)


def _size(root: Path, file: FileItem) -> tuple[int, int] | None:
    """Height and width, px; None if the header cannot be read."""
    path = root / file.image
    try:
        start = start_of(path)
        if is_tiff(start):
            with has_rasterio(file.image).open(path, driver="GTiff") as dataset:
                return dataset.height, dataset.width
        with quiet(), open_stored(path) if is_stored(start) else open_any(path) as image:
            return image.height, image.width
    except UserError:
        raise
    except Exception:  # Pillow's classes, and GDAL, raise nearly any; the writer will say what is wrong
        return None


def _refuse_equal_keys(cuts: Sequence[Sequence[FileItem | TileItem]]) -> None:
    whole = [cut[0].key for cut in cuts if isinstance(cut[0], FileItem) and _KEY_OF_TILE.fullmatch(cut[0].key)]
    if whole:
        tiles = {item.key: item.file for cut in cuts for item in cut if isinstance(item, TileItem)}
        for key in whole:
            if key in tiles:
                raise DataError(f"{tiles[key].image}: a tile of it has the key {key!r}, as another image; rename one")
