import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.evaluation.windows import Blend, window_starts


@given(side=st.integers(1, 500), window=st.integers(1, 200), overlap=st.floats(0, 0.9))
def test_windows_cover_every_pixel_and_overlap_enough(side, window, overlap):
    starts = window_starts(side, window, overlap)
    assert starts[0] == 0
    assert starts == sorted(starts)
    if side > window:
        assert starts[-1] == side - window
        steps = [b - a for a, b in zip(starts, starts[1:])]
        assert max(steps) <= window * (1 - overlap) + 1


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    window=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    overlap=st.floats(0, 0.9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_blocks_are_the_mean_of_the_windows_over_each_pixel(size, window, overlap, seed):
    """Against sums over the whole image, in the same order: equal to the last bit."""
    draw = torch.Generator().manual_seed(seed)
    tops, lefts = (window_starts(side, own, overlap) for side, own in zip(size, window))
    padded = [max(side, own) for side, own in zip(size, window)]
    total, found, covered = torch.zeros(3, *padded), torch.zeros(3, *size), torch.zeros(size)
    blend = Blend(tops, lefts, window)
    for top in tops:
        for left in lefts:
            scores = torch.rand(3, *window, generator=draw)
            total[:, top : top + window[0], left : left + window[1]] += scores
            block = blend.close(blend.open(3, torch.device("cpu")).add_(scores)).within(*size)
            found[:, block.rows, block.columns] = block.probabilities
            covered[block.rows, block.columns] += 1
    assert covered.eq(1).all()
    total = total[:, : size[0], : size[1]]
    assert found.equal(total / total.sum(0, keepdim=True))
