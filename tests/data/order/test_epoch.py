"""The order of an epoch is a bijection and a pure function; a queue, however dealt, loses and repeats nothing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.order.epoch import Cut, EpochOrder, Interval, Queue, permutation

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


def taken(queue, counts):
    return [queue.at(lane, n) for lane, count in enumerate(counts) for n in range(count)]


@st.composite
def queues(draw):
    left = []
    for epoch in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, 5))
        left.append(Interval(epoch, draw(st.integers(1, 3)), start, start + draw(st.integers(1, 7))))
    return Queue(draw(st.integers(1, 12)), draw(st.integers(1, 5)), tuple(left), len(left))


@given(queue=queues(), epochs=st.integers(1, 4))
def test_lanes_together_take_epoch_after_epoch(queue, epochs):
    """What all lanes have taken after any number of samples is what comes first, to less than one sample a lane."""
    rest = sum(i.stop - i.start for i in queue.left)
    total = rest + epochs * queue.samples
    shown = [queue.at(number % queue.lanes, number // queue.lanes) for number in range(total)]
    expected = [(i.epoch, i.lanes, p) for i in queue.left for p in range(i.start, i.stop)]
    assert sorted(shown[:rest]) == sorted(expected)
    for epoch in range(epochs):
        of_epoch = shown[rest + epoch * queue.samples : rest + (epoch + 1) * queue.samples]
        assert {(p.epoch, p.lanes) for p in of_epoch} == {(queue.epoch + epoch, queue.lanes)}
        assert sorted(p.place for p in of_epoch) == list(range(queue.samples))


@given(queue=queues(), steps=st.integers(0, 30), data=st.data())
@settings(max_examples=200)
def test_dealing_anew_loses_nothing_and_repeats_nothing(queue, steps, data):
    # Lanes of a mix may be a sample apart.
    counts = [steps + data.draw(st.integers(0, 1)) for _ in range(queue.lanes)]
    before = taken(queue, counts)
    after = queue.after(counts, data.draw(st.integers(1, 5)))
    last = after.epoch + 2
    enough = sum(i.stop - i.start for i in after.left) + 2 * after.samples
    rest = [after.at(n % after.lanes, n // after.lanes) for n in range(enough)]
    shown = Counter((p.epoch, p.place) for p in before + rest)
    expected = Counter((i.epoch, p) for i in queue.left for p in range(i.start, i.stop))
    expected.update((epoch, p) for epoch in range(queue.epoch, last) for p in range(queue.samples))
    assert shown == expected
    # Places of an epoch keep the order that the epoch began with.
    lanes = {p.epoch: p.lanes for p in before}
    assert all(p.lanes == lanes[p.epoch] for p in rest if p.epoch in lanes)


@pytest.mark.parametrize("lanes", [1, 64])
def test_a_queue_of_many_epochs_is_small(lanes):
    queue = Queue(10**9, lanes).after([12345] * lanes, 2 * lanes)
    assert len(queue.left) <= lanes
