"""A queue of epochs loses no sample and repeats none, whatever lanes it is dealt to."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.order.queue import Interval, Queue


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


def taken_one_by_one(queue, total):
    """What each lane takes of the first ``total`` samples, from a list of all places of all rounds."""
    by_lane = [[] for _ in range(queue.lanes)]
    rounds = [[(i.epoch, i.lanes, place) for i in queue.left for place in range(i.start, i.stop)]]
    while sum(map(len, rounds)) < total:
        epoch = queue.epoch + len(rounds) - 1
        rounds.append([(epoch, queue.lanes, place) for place in range(queue.samples)])
    number = 0
    for places in rounds:
        each, longer = divmod(len(places), queue.lanes)
        runs, at = [], 0
        for run in range(queue.lanes):
            size = each + (run < longer)
            runs.append(places[at : at + size])
            at += size
        for turn in range(len(places)):
            by_lane[number % queue.lanes].append(runs[turn % queue.lanes][turn // queue.lanes])
            number += 1
    return by_lane


@given(queue=queues(), steps=st.integers(0, 12), more=st.integers(1, 5))
@settings(max_examples=200)
def test_a_place_is_that_of_the_plain_list(queue, steps, more):
    """Also after the mix has changed, and for a queue of many intervals."""
    for of in (queue, queue.after([steps] * queue.lanes, more)):
        for lane, expected in enumerate(taken_one_by_one(of, 40)):
            assert [tuple(of.at(lane, count)) for count in range(len(expected))] == expected


class Counting(tuple):
    """Counts how many of its elements are read, and whether it is hashed, which reads all of them."""

    def __new__(cls, *args):
        made = super().__new__(cls, *args)
        made.read = 0
        return made

    def __getitem__(self, number):
        self.read += 1
        return super().__getitem__(number)

    def __iter__(self):
        self.read += len(self)
        return super().__iter__()

    def __hash__(self):
        self.read += len(self)
        return super().__hash__()


def test_a_place_takes_no_longer_where_much_is_left():
    """With eight changes of the mix at 512 lanes thousands of intervals are left, and each sample asks for places."""
    queue = Queue(10**6, 512)
    for change in range(8):
        queue = queue.after([40 + lane % 2 for lane in range(queue.lanes)], 512 - change)
    assert len(queue.left) > 500
    queue = Queue(queue.samples, queue.lanes, Counting(queue.left), queue.epoch)
    queue.at(0, 0)
    queue.left.read = 0
    for count in range(100):
        queue.at(count % queue.lanes, count)
    assert queue.left.read <= 100
