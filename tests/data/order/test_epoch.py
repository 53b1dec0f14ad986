"""The order of an epoch is a bijection and a pure function."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.data import node_arrays
from maskmatch_scale.data.node_arrays import NodeArrays
from maskmatch_scale.data.order import epoch
from maskmatch_scale.data.order.epoch import Cut, EpochOrder, lay_out_once, permutation

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(np.array)


@given(length=st.integers(0, 40), runs=st.integers(1, 12))
def test_runs_cover_the_sequence_evenly(length, runs):
    cut = Cut(length, runs)
    lengths = [cut.start(run + 1) - cut.start(run) for run in range(runs)]
    assert (cut.start(0), cut.start(runs)) == (0, length)
    assert max(lengths) - min(lengths) <= 1
    assert all(cut.start(cut.run_of(p)) <= p < cut.start(cut.run_of(p) + 1) for p in range(length))


@given(sizes=sizes, seed=st.integers(0, 2**62), window=st.integers(1, 60), lanes=st.integers(1, 9))
def test_every_sample_once_an_epoch(sizes, seed, window, lanes):
    order = EpochOrder(sizes, seed, window, lanes)
    shown = [order[place] for place in range(len(order))]
    assert sorted(shown) == [(shard, place) for shard, size in enumerate(sizes) for place in range(size)]


@settings(deadline=None, max_examples=40)  # each writes to a disk
@given(sizes=sizes, seed=st.integers(0, 2**62), window=st.integers(1, 60), lanes=st.integers(1, 9))
def test_from_files_bit_for_bit(sizes, seed, window, lanes):
    """What the processes of a node map, as it is made and as it is found, is what each would compute."""
    plain = EpochOrder(sizes, seed, window, lanes)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch, "LARGE", 1)
        for _ in range(2):
            laid = lay_out_once(sizes, "digest", seed, NodeArrays(Path(folder)))
            assert isinstance(laid.shards, node_arrays._Mapped)
            assert laid.shards.tobytes() == plain.shards.tobytes()
            assert laid.starts.tobytes() == plain.starts.tobytes()
            order = EpochOrder(sizes, seed, window, lanes, laid)
            assert [order[place] for place in range(len(order))] == [plain[place] for place in range(len(plain))]
            for place in range(0, len(order), 7):
                start, stop = order.window_of(place)
                assert order.shards_of(start, stop) == plain.shards_of(start, stop)


@given(sizes=sizes, seed=st.integers(0, 2**62), window=st.integers(1, 60), lanes=st.integers(1, 9))
def test_a_window_takes_from_the_shards_that_it_says(sizes, seed, window, lanes):
    order = EpochOrder(sizes, seed, window, lanes)
    for place in range(len(order)):
        start, stop = order.window_of(place)
        assert start <= place < stop <= start + window
        assert {order[p][0] for p in range(start, stop)} == set(order.shards_of(start, stop))


@given(sizes=sizes, seed=st.integers(0, 2**62), window=st.integers(1, 60), lanes=st.integers(1, 9))
def test_a_shard_is_read_by_one_lane_but_for_those_that_a_cut_goes_through(sizes, seed, window, lanes):
    order = EpochOrder(sizes, seed, window, lanes)
    readers = Counter()
    for lane in range(lanes):
        readers.update({order[p][0] for p in range(order.cut.start(lane), order.cut.start(lane + 1))})
    assert sum(readers.values()) <= len(sizes) + lanes - 1


def test_the_same_on_every_machine():
    # From Philox's published bits: another numpy or processor must give the same.
    assert permutation(7, 10).tolist() == PERMUTATION
    order = EpochOrder(np.array([3, 2, 4]), 7, 4, 2)
    assert [order[place] for place in range(9)] == ORDER


PERMUTATION = [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]
ORDER = [(1, 1), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (0, 2), (0, 0), (0, 1)]


def test_seeds_and_windows_differ():
    sizes = np.full(20, 5)
    shown = {tuple(EpochOrder(sizes, s, w, 1)[p] for p in range(100)) for s in range(3) for w in (1, 10, 100)}
    assert len(shown) == 9
