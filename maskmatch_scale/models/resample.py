"""Bilinear upsampling in bands of rows, so that the upsampled maps never exist whole; images at several scales.

A band of output rows depends on a few source rows: it is a small matrix times these rows. The matrix is that of
`F.interpolate(mode="bilinear", align_corners=False)`, and backward multiplies by its transpose. So `upsampled_sum` adds
in a fixed order on every device. `RowBand` leaves the columns to torch, whose backward adds atomically on GPUs, which
is in no fixed order.

Decision: docs/decisions/0016-bands-and-chunks.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = {"cpu": 2**18}
"""A CPU works through a chunk in several passes, so a chunk should fit the cache: 1 MB in float32."""
_CHUNK_ELEMENTS_ELSEWHERE = 2**27
"""An accelerator needs work for all its processors; 512 MB in float32 is little of its memory."""

_BAND_ROWS = {"cpu": 8}
"""Few rows keep the matrix of a band small and its rows in the cache."""
_BAND_ROWS_ELSEWHERE = 128

_IMAGES_AT_ONCE = {"cpu": 1}
"""Images whose levels are added together; elsewhere all, since each launch costs as much as its arithmetic."""


_planned_kind: str | None = None


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Take the sizes of another kind of device ("cuda", "cpu") in this context, for tensors that have no memory.

    What is kept from one call to the next would otherwise be taken for real tensors afterwards, so it is forgotten.
    """
    global _planned_kind
    upsampling_bands.cache_clear()
    before, _planned_kind = _planned_kind, kind
    try:
        yield
    finally:
        _planned_kind = before
        upsampling_bands.cache_clear()


def _kind(device: torch.device) -> str:
    return _planned_kind or device.type


def chunk_length(elements: int, device: torch.device) -> int:
    """How many items of `elements` numbers make a chunk on a device; at least 1.

    Args:
        elements: numbers an item.
        device: where the chunk lies.
    """
    return max(1, _CHUNK_ELEMENTS.get(_kind(device), _CHUNK_ELEMENTS_ELSEWHERE) // elements)


@dataclass(frozen=True)
class Band:
    """Some neighbouring output rows, and the source rows that they are made of: `output = weight @ source`."""

    output: slice
    source: slice
    weight: Tensor
    """(output rows, source rows)."""


@lru_cache(maxsize=256)
def upsampling_bands(
    source: int, output: int, rows: int, dtype: torch.dtype, device: torch.device, margin: int = 0
) -> list[Band]:
    """Cut `output` rows, interpolated from `source` rows, into bands of at most `rows` rows.

    Args:
        source: number of source rows.
        output: number of output rows.
        rows: most output rows of a band.
        dtype: of the weights.
        device: of the weights.
        margin: rows before and after these that the source rows stand for as well, and that are not made.
    """
    # With numpy: these numbers are of the host, whatever mode torch is in.
    place = ((np.arange(margin, margin + output) + 0.5) * (source / (output + 2 * margin)) - 0.5).clip(min=0)
    first = np.floor(place).astype(np.int64)
    second = (first + 1).clip(max=source - 1)
    share = place - first
    bands = []
    for start in range(0, output, rows):
        own = slice(start, min(start + rows, output))
        low, high = int(first[own][0]), int(second[own][-1]) + 1
        weight = np.zeros((own.stop - own.start, high - low))
        row = np.arange(len(weight))
        weight[row, first[own] - low] = 1 - share[own]
        weight[row, second[own] - low] += share[own]
        bands.append(Band(own, slice(low, high), torch.from_numpy(weight).to(device, dtype)))
    return bands


@dataclass(frozen=True)
class RowBand:
    """Some neighbouring rows of maps (B, C, h, w) upsampled to (B, C, H, W)."""

    output: slice
    source: slice
    weight: Tensor | None
    """(output rows, source rows); None: the rows are not upsampled."""
    width: int
    margin: int = 0
    """Columns before and after these that the maps stand for as well; they are upsampled and left out."""

    def upsample(self, maps: Tensor) -> Tensor:
        """Make these rows, (B, C, rows, W) in at least float32, of maps (B, C, h, w)."""
        rows = at_least_float32(maps[:, :, self.source])
        if self.weight is not None:
            rows = self.weight @ rows
        whole = self.width + 2 * self.margin
        if rows.shape[3] != whole:
            rows = F.interpolate(rows, size=(rows.shape[2], whole), mode="bilinear", align_corners=False)
        return rows[..., self.margin : self.margin + self.width] if self.margin else rows

    def add_gradient(self, gradient: Tensor, into: Tensor) -> None:
        """Add to `into` (B, C, h, w) the gradient of the maps, given that of `upsample`'s result (B, C, rows, W)."""
        assert not self.margin, "only a teacher's maps have a margin"
        batch, channels, rows, width = gradient.shape
        if width != into.shape[3]:
            size = [batch, channels, rows, into.shape[3]]
            gradient = torch.ops.aten.upsample_bilinear2d_backward(gradient, [rows, width], size, False, None, None)
        into[:, :, self.source] += gradient if self.weight is None else self.weight.T @ gradient


def upsampling_rows(maps: Tensor, height: int, width: int, images: int | None = None, margin: int = 0) -> list[RowBand]:
    """Bands that upsample maps (B, C, h, w) to height × width, each as large as a chunk should be (`chunk_length`).

    Maps of the same B and C are cut into the same output rows, whatever their h and w, and whatever the margin.

    Args:
        maps: (B, C, h, w).
        height: of the output, rows.
        width: of the output.
        images: cut as maps of so many images are; None: B.
        margin: px on each side that the maps stand for as well, and that are left out.
    """
    batch, channels, own_height, _ = maps.shape
    length = chunk_length((images or batch) * channels * width, maps.device)
    if own_height == height + 2 * margin:
        parts = [(start, min(start + length, height)) for start in range(0, height, length)]
        return [RowBand(slice(a, b), slice(a + margin, b + margin), None, width, margin) for a, b in parts]
    dtype = torch.promote_types(maps.dtype, torch.float32)
    bands = upsampling_bands(own_height, height, length, dtype, maps.device, margin)
    return [RowBand(band.output, band.source, band.weight, width, margin) for band in bands]


def upsampled_sum(levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Σ of maps, each bilinearly upsampled to the first one's size.

    Args:
        levels: (B · h · w, C) of every level, positions row-major. The first is overwritten, since these are the
            largest tensors of a model and no gradient needs the old values.
        sizes: (h, w) of every level.

    Returns:
        (B · h · w, C), h × w the first level's size.
    """
    if len(levels) == 1:
        return levels[0]
    if is_exported():
        return _plain_sum(levels, sizes)
    with torch.autocast(levels[0].device.type, enabled=False):
        total: Tensor = _UpsampledSum.apply(tuple(sizes), *levels)
    return total


def is_exported() -> bool:
    """Whether `torch.export` is tracing this call: then only torch's own operations are used, without buffers.

    Its graph would hold a loop over bands or chunks unrolled, and every write into a buffer as a scatter.
    """
    return _is_exporting()


_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # the former since torch 2.7


def _plain_sum(levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """What `upsampled_sum` gives, by torch's interpolation of whole maps."""
    maps = [rows.view(-1, *size, rows.shape[1]).permute(0, 3, 1, 2) for rows, size in zip(levels, sizes)]
    total = maps[0]
    for level in maps[1:]:
        total = total + F.interpolate(level, size=sizes[0], mode="bilinear", align_corners=False)
    return total.permute(0, 2, 3, 1).reshape(-1, total.shape[1])


class _UpsampledSum(torch.autograd.Function):
    """`upsampled_sum`: linear, so that nothing is kept for backward. Sums are at least float32."""

    @staticmethod
    def forward(ctx: Any, sizes: Sequence[tuple[int, int]], *levels: Tensor) -> Tensor:
        ctx.sizes = sizes
        ctx.mark_dirty(levels[0])
        height, width = sizes[0]
        total, *others = (level.view(-1, *size, level.shape[1]) for level, size in zip(levels, sizes))
        dtype = torch.promote_types(total.dtype, torch.float32)
        for bands in zip(*(_bands(level.shape[1], height, dtype, level.device) for level in others)):
            for images in _parts(len(total), total.device):
                rows = total[images, bands[0].output].flatten(2)
                summed = rows.to(dtype)  # a copy in half precision, `rows` itself otherwise
                for band, level in zip(bands, others):
                    source = level[images, band.source].to(dtype)
                    wide = _widened(source.flatten(0, 1), width)
                    _add_product(summed, band.weight, wide.view(*source.shape[:2], -1))
                if summed is not rows:
                    rows.copy_(summed)
        return levels[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (height, width), channels = ctx.sizes[0], gradient.shape[1]
        images = gradient.reshape(-1, height, width, channels)
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        narrow = [gradient.new_zeros(len(images), *size, channels, dtype=dtype) for size in ctx.sizes[1:]]
        for bands in zip(*(_bands(level.shape[1], height, dtype, level.device) for level in narrow)):
            for part in _parts(len(images), images.device):
                rows = images[part, bands[0].output].flatten(2).to(dtype)
                for band, level in zip(bands, narrow):
                    wide = _product(band.weight.T, rows)
                    columns = _narrowed(wide.view(-1, width, channels), level.shape[2])
                    level[part, band.source] += columns.view(len(rows), -1, *columns.shape[1:])
        return None, gradient, *(level.flatten(0, 2).to(gradient.dtype) for level in narrow)


def _parts(images: int, device: torch.device) -> list[slice]:
    """Images that are worked on together: on a CPU one after the other, whose rows stay in the cache; else all."""
    at_once = _IMAGES_AT_ONCE.get(_kind(device), images)
    return [slice(start, min(start + at_once, images)) for start in range(0, images, max(1, at_once))]


def _product(weight: Tensor, rows: Tensor) -> Tensor:
    """Weight (m, k) times each of (n, k, p): (n, m, p)."""
    return (weight @ rows[0])[None] if len(rows) == 1 else weight @ rows


def _add_product(into: Tensor, weight: Tensor, rows: Tensor) -> None:
    """Add weight (m, k) times each of (n, k, p) to (n, m, p), in place."""
    if len(into) == 1:
        torch.addmm(into[0], weight, rows[0], out=into[0])
    else:
        into.baddbmm_(weight.expand(len(into), -1, -1), rows)


def _widened(maps: Tensor, width: int) -> Tensor:
    """Upsample the columns of (rows, columns, C)."""
    if maps.shape[1] == width:
        return maps
    wide = maps.new_empty(len(maps), width, maps.shape[2])
    for band in _bands(maps.shape[1], width, maps.dtype, maps.device):
        wide[:, band.output] = band.weight @ maps[:, band.source]
    return wide


def _narrowed(gradient: Tensor, columns: int) -> Tensor:
    """Gradient (rows, columns, C) of what `_widened` widened."""
    if gradient.shape[1] == columns:
        return gradient
    narrow = gradient.new_zeros(len(gradient), columns, gradient.shape[2])
    for band in _bands(columns, gradient.shape[1], gradient.dtype, gradient.device):
        narrow[:, band.source] += band.weight.T @ gradient[:, band.output]
    return narrow


def resized(images: Tensor, scale: float, patch_px: int) -> Tensor:
    """Images (B, C, H, W) resized bilinearly by a factor, sides rounded to whole patches; as they are if that is it."""
    size = resized_px(images.shape[-2:], scale, patch_px)
    if size == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def resized_px(size_px: Sequence[int], scale: float, patch_px: int) -> tuple[int, int]:
    """Height and width of an image at a scale, pixels, rounded to whole patches."""
    rows, columns = (max(patch_px, round(side * scale / patch_px) * patch_px) for side in size_px)
    return rows, columns


def at_least_float32(values: Tensor) -> Tensor:
    """bfloat16 and float16 to float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _bands(source: int, output: int, dtype: torch.dtype, device: torch.device) -> list[Band]:
    return upsampling_bands(source, output, _BAND_ROWS.get(_kind(device), _BAND_ROWS_ELSEWHERE), dtype, device)
