"""Masks and their index arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maskmatch_scale.models import units

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(grid=grids, batch=st.integers(1, 4), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_sample_visible_is_sorted_without_repeats_and_repeatable(grid, batch, share, seed):
    total = grid[0] * grid[1]
    k = max(1, round(share * total))
    visible = units.sample_visible(batch, grid, k, torch.Generator().manual_seed(seed))
    assert visible.dtype == torch.int64
    assert visible.shape == (batch, k)
    assert (visible[:, 1:] > visible[:, :-1]).all()
    assert visible.min() >= 0
    assert visible.max() < total
    assert visible.equal(units.sample_visible(batch, grid, k, torch.Generator().manual_seed(seed)))
    units.check_visible(visible, batch, grid, visible.device)

    others = units.masked_units(visible, grid)
    assert torch.cat([visible, others], 1).sort(1).values.equal(torch.arange(total).expand(batch, -1))
    assert others.equal(others.sort(1).values)


def test_sample_visible_is_uniform():
    visible = units.sample_visible(20_000, (3, 4), 4, torch.Generator().manual_seed(0))
    share = torch.bincount(visible.flatten(), minlength=12) / 20_000
    assert (share - 4 / 12).abs().max() < 0.015  # 4.5 standard deviations


def test_visible_count_rounds():
    assert units.visible_count((5, 5), 0.3) == round(0.3 * 25)
    assert units.visible_count((1, 1), 1.0) == 1
    with pytest.raises(ValueError, match=r"keep: 0\.1 of 2×2 units leaves none"):
        units.visible_count((2, 2), 0.1)
    for keep in (0.0, -1.0, 1.01):
        with pytest.raises(ValueError, match="keep"):
            units.visible_count((4, 4), keep)


@pytest.mark.parametrize("k", [0, 13])
def test_sample_visible_refuses_impossible_counts(k):
    with pytest.raises(ValueError, match=f"k: {k} visible units out of 3×4"):
        units.sample_visible(1, (3, 4), k)


def test_pixel_mask_and_zeroing():
    visible = torch.tensor([[0, 5], [2, 3]])
    mask = units.visible_pixel_mask(visible, (2, 3), 4)
    assert mask.shape == (2, 8, 12)
    for b in range(2):
        for y in range(8):
            for x in range(12):
                assert mask[b, y, x] == (y // 4 * 3 + x // 4 in visible[b].tolist())
    images = torch.randn(2, 3, 8, 12)
    zeroed = units.zero_masked_pixels(images, visible, (2, 3), 4)
    assert zeroed.equal(torch.where(mask[:, None], images, 0.0))
    images[~mask[:, None].expand_as(images)] = torch.nan
    assert units.zero_masked_pixels(images, visible, (2, 3), 4).equal(zeroed)


@given(grid=grids, r=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_merge_undoes_gather(grid, r, seed):
    generator = torch.Generator().manual_seed(seed)
    total = grid[0] * grid[1]
    visible = units.sample_visible(2, grid, (total + 1) // 2, generator)
    maps = torch.randn(2, 3, grid[0] * r, grid[1] * r, generator=generator)
    everything = torch.arange(total).expand(2, -1)
    assert units.unit_tokens(maps, grid).equal(units.gather_units(maps, everything, grid))
    tokens = units.gather_units(maps, visible, grid)
    others = units.gather_units(maps, units.masked_units(visible, grid), grid) if total > 1 else None
    assert units.merge_units(tokens, visible, others, grid).equal(maps)
    mask = units.visible_pixel_mask(visible, grid, r)
    assert units.merge_units(tokens, visible, None, grid).equal(maps * mask[:, None])


@given(grid=grids, r=st.integers(1, 4), before=st.integers(0, 5), after=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_halo_reads_what_padding_and_masking_would(grid, r, before, after, seed):
    generator = torch.Generator().manual_seed(seed)
    total = grid[0] * grid[1]
    visible = units.sample_visible(2, grid, (total + 1) // 2, generator)
    maps = torch.randn(2, 3, grid[0] * r, grid[1] * r, generator=generator)
    tokens = units.gather_units(maps, visible, grid).reshape(2, -1, 3)
    halo = units.UnitPlan(visible, grid).halo(r, before, after)
    side = before + r + after
    windows = halo.windows(units.with_zero_row(tokens.flatten(0, 1))).view(2, visible.shape[1], 3, side, side)
    padded = F.pad(maps * units.visible_pixel_mask(visible, grid, r)[:, None], (before, after, before, after))
    for b in range(2):
        for j, unit in enumerate(visible[b].tolist()):
            y, x = unit // grid[1] * r, unit % grid[1] * r
            assert windows[b, j].equal(padded[b, :, y : y + side, x : x + side])


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (torch.tensor([[0, 1]], dtype=torch.int32), "dtype torch.int32"),
        (torch.tensor([0, 1]), "shape"),
        (torch.tensor([[0], [1]]), "shape"),
        (torch.zeros(1, 7, dtype=torch.int64), "shape"),
        (torch.tensor([[0, 6]]), "outside 0 … 5"),
        (torch.tensor([[-1, 2]]), "outside 0 … 5"),
        (torch.tensor([[2, 1]]), "sorted"),
        (torch.tensor([[1, 1]]), "repeats"),
        (torch.zeros(1, 2, dtype=torch.int64, device="meta"), "on meta but images are on cpu"),
    ],
)
def test_check_visible_names_the_fault(visible, message):
    with pytest.raises(ValueError, match=message):
        units.check_visible(visible, 1, (2, 3), torch.device("cpu"))
