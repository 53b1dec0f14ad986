"""Generators depend on every bit of their seed."""

import numpy as np
import pytest
import torch

from maskmatch_scale.data.batches.sources import draw_labelled
from maskmatch_scale.data.order.epoch import permutation
from maskmatch_scale.seeds import derive_seed, generator, generator_of


def drawn(seed):
    return torch.rand(1000, generator=generator_of(seed))


@pytest.mark.parametrize("bit", [32, 40, 50, 62])
def test_seeds_that_differ_in_a_high_bit_only(bit):
    for low in (0, 5, 0xFFFF_FFFF):
        assert (drawn(low) == drawn(low + 2**bit)).float().mean() < 0.01
        assert (drawn(low + 2**bit) == drawn(low + 2 ** (bit - 1))).float().mean() < 0.01


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_small_seeds_draw_as_before(seed):
    assert drawn(seed).equal(torch.rand(1000, generator=torch.Generator().manual_seed(seed)))


def test_both_halves_of_a_seed_are_combined_by_exclusive_or():
    """Against numpy's MT19937, which has the same numbers; so a torch with another layout of its state is noticed."""
    low, upper = (np.random.RandomState(half).randint(0, 2**32, 1000, dtype=np.uint32) for half in (123456, 654321))
    expected = ((low ^ upper) & 0xFF_FFFF) / np.float32(2**24)
    assert np.array_equal(drawn(654321 << 32 | 123456).numpy(), expected.astype(np.float32))


def test_what_is_drawn_for_a_purpose_stays_the_same():
    assert derive_seed(1, "mask", 5) == 1923850942760050357
    assert torch.randint(10**6, (3,), generator=generator(1, "mask", 5)).tolist() == [716861, 421105, 53942]


def test_labelled_samples_are_drawn_by_our_own_generator():
    """`torch.randperm` may give other numbers in another version of torch."""
    (first, second) = draw_labelled([300, 200], 100, 7)
    expected = np.sort(permutation(derive_seed(7, "labelled split"), 500)[:100])
    assert np.array_equal(np.concatenate([first, second + 300]), expected)
    assert [numbers.dtype for numbers in (first, second)] == [np.int64] * 2
    assert first[:5].tolist() == [1, 7, 15, 21, 36]
