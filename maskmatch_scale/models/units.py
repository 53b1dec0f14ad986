"""Visible units: which squares of an image a masked forward computes, and the index arithmetic around them.

A *unit* is a square of `unit_px` pixels; the units of an image form a grid of (rows, cols), numbered row-major.
A mask is `visible`, int64 (B, k): the sorted indices of the k units that are computed, the same k for every image, so
that no shape depends on data. Features of visible units alone are *unit tokens* (B, k, r, r, C): r × r tokens a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
"""(rows, cols) of units."""


def visible_count(grid: Grid, keep: float) -> int:
    """Number of visible units an image, round(keep · rows · cols).

    Raises:
        ValueError: `keep` is not in (0, 1], or so small that no unit is left.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: {keep} is not in (0, 1]; it is the share of units that stays visible")
    rows, cols = grid
    count = round(keep * rows * cols)
    if count == 0:
        raise ValueError(f"keep: {keep} of {rows}×{cols} units leaves none visible; raise it or use larger images")
    return count


def sample_visible(batch: int, grid: Grid, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw k of the grid's units for every image, uniformly and without replacement.

    The first k of the argsort of random numbers, as in MAE (He et al., arXiv 2111.06377).

    Args:
        batch: number of images.
        grid: (rows, cols) of units.
        k: visible units an image, 1 … rows · cols.
        generator: source of the random numbers; the result lies on its device (None: the default CPU generator).

    Returns:
        int64 (batch, k), each row sorted and without repeats.

    Raises:
        ValueError: k is out of range.
    """
    units = grid[0] * grid[1]
    if not 1 <= k <= units:
        raise ValueError(f"k: {k} visible units out of {grid[0]}×{grid[1]}; it must be 1 … {units}")
    device = torch.device("cpu") if generator is None else generator.device
    # float64, so that two equal draws are all but impossible; of two equal ones the lower index would win.
    noise = torch.rand(batch, units, generator=generator, device=device, dtype=torch.float64)
    return noise.argsort(dim=1)[:, :k].sort(dim=1).values


def check_visible(visible: Tensor, batch: int, grid: Grid, device: torch.device) -> None:
    """Refuse an index tensor that is not a mask of these images.

    Values are checked on the CPU only. On an accelerator the check would stall the queue at every step.

    Raises:
        ValueError: wrong dtype, shape or device; on the CPU also unsorted, repeated or out-of-range indices.
    """
    units = grid[0] * grid[1]
    if visible.dtype != torch.int64:
        raise ValueError(f"visible: dtype {visible.dtype}; it must be torch.int64 (see units.sample_visible)")
    if visible.ndim != 2 or visible.shape[0] != batch or not 1 <= visible.shape[1] <= units:
        raise ValueError(
            f"visible: shape {tuple(visible.shape)}; it must be ({batch}, k) with k = 1 … {units} "
            f"for {batch} images of {grid[0]}×{grid[1]} units"
        )
    if visible.device != device:
        raise ValueError(f"visible: on {visible.device} but images are on {device}; move it to the images' device")
    if can_be_read(visible):
        if bool((visible < 0).any()) or bool((visible >= units).any()):
            raise ValueError(f"visible: holds an index outside 0 … {units - 1} of the {grid[0]}×{grid[1]} unit grid")
        if bool((visible[:, 1:] <= visible[:, :-1]).any()):
            raise ValueError("visible: every row must be sorted and without repeats (see units.sample_visible)")


def can_be_read(values: Tensor) -> bool:
    """Whether values can be looked at in the middle of a pass: on the CPU, if neither compiled nor without memory.

    On an accelerator the host would wait for it. Of a tensor of `FakeTensorMode`, with which memory is planned, there
    are no values.
    """
    return (
        values.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and values.untyped_storage().device.type == "cpu"
    )


def visible_unit_mask(visible: Tensor, grid: Grid) -> Tensor:
    """Bool (B, rows, cols), true at visible units."""
    rows, cols = grid
    mask = torch.zeros(visible.shape[0], rows * cols, dtype=torch.bool, device=visible.device)
    return mask.scatter_(1, visible, True).view(-1, rows, cols)


def visible_pixel_mask(visible: Tensor, grid: Grid, unit_px: int) -> Tensor:
    """Bool (B, rows · unit_px, cols · unit_px), true at the pixels of visible units."""
    mask = visible_unit_mask(visible, grid)
    return mask.repeat_interleave(unit_px, dim=1).repeat_interleave(unit_px, dim=2)


def zero_masked_pixels(images: Tensor, visible: Tensor, grid: Grid, unit_px: int) -> Tensor:
    """Images (B, C, H, W) with the pixels of masked units set to zero, and no gradient to them.

    Zero in normalised space is the mean colour: the mask of MIC (Hoyer et al., CVPR 2023, arXiv 2212.01322).
    """
    mask = visible_pixel_mask(visible, grid, unit_px)
    # Not a product with the mask, by which a masked NaN or infinity would survive.
    return images.masked_fill(~mask[:, None], 0)


def masked_units(visible: Tensor, grid: Grid) -> Tensor:
    """The other units: int64 (B, rows · cols − k), sorted."""
    mask = visible_unit_mask(visible, grid).flatten(1)
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : mask.shape[1] - visible.shape[1]]


def gather_units(maps: Tensor, visible: Tensor, grid: Grid) -> Tensor:
    """Cut visible units out of dense maps (B, C, h, w): unit tokens (B, k, r, r, C), r = h / rows."""
    image = torch.arange(len(maps), device=visible.device)[:, None]
    return _tiles(maps, grid)[image, visible // grid[1], visible % grid[1]]


def unit_tokens(maps: Tensor, grid: Grid) -> Tensor:
    """Dense maps (B, C, h, w) as unit tokens of all units (B, rows · cols, r, r, C), r = h / rows."""
    return _tiles(maps, grid).flatten(1, 2)


def _tiles(maps: Tensor, grid: Grid) -> Tensor:
    """A view of dense maps (B, C, h, w) as (B, rows, cols, r, r, C)."""
    batch, channels, height, width = maps.shape
    rows, cols = grid
    return maps.view(batch, channels, rows, height // rows, cols, width // cols).permute(0, 2, 4, 3, 5, 1)


def merge_units(tokens: Tensor, visible: Tensor, others: Tensor | None, grid: Grid) -> Tensor:
    """Lay unit tokens out as dense maps.

    Args:
        tokens: (B, k, r, r, C) of the visible units.
        visible: int64 (B, k).
        others: (B, rows · cols − k, r, r, C) of the masked units, in the order of `masked_units`; None: zeros.
        grid: (rows, cols) of units.

    Returns:
        (B, C, rows · r, cols · r), in channels-last memory.
    """
    batch, k, r, _, channels = tokens.shape
    rows, cols = grid
    if others is not None:
        tokens = torch.cat([tokens, others.to(tokens.dtype)], dim=1)
        # One gather in unit order is cheaper than two scatters, in backward too.
        order = torch.cat([visible, masked_units(visible, grid)], dim=1).argsort(dim=1)
    elif k < rows * cols:
        tokens = torch.cat([tokens, tokens.new_zeros(batch, 1, r, r, channels)], dim=1)
        order = unit_slots(visible, grid, fill=k).flatten(1)
    if tokens.shape[1] > k:
        offset = torch.arange(batch, device=visible.device)[:, None] * tokens.shape[1]
        tokens = tokens.flatten(0, 1).index_select(0, (order + offset).flatten())
    tiles = tokens.view(batch, rows, cols, r, r, channels).transpose(2, 3)
    return tiles.reshape(batch, rows * r, cols * r, channels).permute(0, 3, 1, 2)


def stack_units(tokens: Tensor) -> Tensor:
    """Unit tokens (B, k, r, r, C) as maps (B, C, k · r, r): the units one below the other."""
    return tokens.flatten(1, 2).permute(0, 3, 1, 2)


def unstack_units(maps: Tensor) -> Tensor:
    """The inverse of `stack_units`: maps (B, C, k · r, r) to unit tokens (B, k, r, r, C)."""
    batch, channels, _, r = maps.shape
    return maps.permute(0, 2, 3, 1).reshape(batch, -1, r, r, channels)


def unit_slots(visible: Tensor, grid: Grid, fill: int) -> Tensor:
    """Place of every unit in its image's row of `visible`: int64 (B, rows, cols), `fill` at masked units."""
    batch, k = visible.shape
    slots = torch.full((batch, grid[0] * grid[1]), fill, dtype=torch.int64, device=visible.device)
    return slots.scatter_(1, visible, torch.arange(k, device=visible.device).expand(batch, k)).view(batch, *grid)


class UnitPlan:
    """The index arithmetic of one mask, computed once and used by every layer of every stage.

    Attributes:
        visible: int64 (B, k).
        grid: (rows, cols) of units.
        image: int64 (B, 1), number of the image.
        row: int64 (B, k), row of every visible unit on the grid.
        col: int64 (B, k), column.
    """

    def __init__(self, visible: Tensor, grid: Grid) -> None:
        self.visible = visible
        self.grid = grid
        self.image = torch.arange(visible.shape[0], device=visible.device)[:, None]
        self.row, self.col = visible // grid[1], visible % grid[1]
        self._slots = unit_slots(visible, grid, fill=-1)
        self._halos: dict[tuple[int, int, int], Halo] = {}

    def halo(self, r: int, before: int, after: int) -> Halo:
        """Windows of visible units of r × r tokens with margins of `before` (top, left) and `after` tokens."""
        key = (r, before, after)
        if key not in self._halos:
            self._halos[key] = self._plan_halo(*key)
        return self._halos[key]

    def _plan_halo(self, r: int, before: int, after: int) -> Halo:
        batch, k = self.visible.shape
        offset = torch.arange(-before, r + after, device=self.visible.device)
        reach = max(-(-before // r), -(-after // r), 0)  # how many units away a margin reads
        neighbour, within = offset.div(r, rounding_mode="floor") + reach, offset.remainder(r)
        slots = F.pad(self._slots, (reach,) * 4, value=-1)
        row = self.row[..., None, None] + neighbour[:, None]
        col = self.col[..., None, None] + neighbour
        slot = slots[self.image[..., None, None], row, col]  # (B, k, side, side)
        token = (self.image[..., None, None] * k + slot) * (r * r) + within[:, None] * r + within
        return Halo(torch.where(slot >= 0, token, batch * k * r * r).flatten(0, 1))


@dataclass(frozen=True)
class Halo:
    """Where the tokens of every visible unit's window lie: the unit itself and a margin of its neighbours' tokens.

    Tokens of masked units and those outside the image are read as zero. A zero-padded convolution reads the outside of
    the image in the same way.

    Attributes:
        index: int64 (B · k, side, side), rows of the flattened unit tokens; B · k · r² stands for zero.
    """

    index: Tensor

    def windows(self, table: Tensor) -> Tensor:
        """Gather rows of a table (B · k · r² + 1, C), the last one zero, into windows (B · k, C, side, side).

        Windows lie in channels-last memory. `with_zero_row` makes a table by a copy; a layer that knows that its output
        is gathered writes it into one (`segformer.layers.TableLinear`).
        """
        return table.index_select(0, self.index.flatten()).view(*self.index.shape, -1).permute(0, 3, 1, 2)

    def patches(self, tokens: Tensor, kernel: int, stride: int) -> Tensor:
        """Gather (B, k · r², C) unit tokens into what a convolution's kernel sees at each place of the windows.

        (B · k · places², kernel² · C), taps row-major, channels last.
        """
        index = self.index.unfold(1, kernel, stride).unfold(2, kernel, stride)  # (B · k, places, places, taps, taps)
        rows = with_zero_row(tokens.flatten(0, -2)).index_select(0, index.flatten())
        return rows.view(-1, kernel * kernel * tokens.shape[-1])


def with_zero_row(rows: Tensor) -> Tensor:
    """Copy rows (n, C) into a table (n + 1, C) whose last row is zero."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
