"""Lanes of a source without an index: a plain reference, stops anywhere, and shards that do not come."""

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.faults import BadSample, NotFetched
from maskmatch_scale.data.order.epoch import permutation
from maskmatch_scale.data.order.lane import Lane, LaneState, OutOfReachError, Windows
from maskmatch_scale.data.order.patience import Patience
from maskmatch_scale.data.shards.reading import RawSample
from maskmatch_scale.data.shards.sequence import Found
from maskmatch_scale.seeds import derive_seed

SEED = 7
sizes = st.lists(st.integers(1, 9), min_size=8, max_size=14)
"""Samples of each shard."""


def reader(sizes, gone=(), reads=None):
    """Shards in memory. Those whose numbers are in `gone` end with a fault, before the sample that it says."""

    def read(shard):
        if reads is not None:
            reads.append(shard)
        for number in range(sizes[shard]):
            if shard in gone and gone[shard][0] == number:
                raise gone[shard][1]
            yield Found(f"{shard}-{number}", RawSample(f"{shard}-{number}", f"{shard}.tar", b"jpg", None))

    return read


def make(sizes, lane=0, lanes=1, window=7, state=LaneState(), patience=None, most_bytes=10**9, first=64, **how):  # noqa: B008
    read = how.pop("read", None) or reader(sizes, how.pop("gone", ()), how.pop("reads", None))
    windows = Windows(window, most_bytes, first)
    return Lane(SEED, len(sizes), lane, lanes, windows, read, patience or Patience(), state=state, **how)


def keys(lane, count):
    return [lane.take().found.key for _ in range(count)]


def expected(sizes, lane, lanes, window, first):
    """What a lane gives, without end, said as plainly as can be."""

    def in_order():
        for epoch in range(1000):
            for shard in permutation(derive_seed(SEED, "shards", epoch), len(sizes))[lane::lanes]:
                yield from (f"{shard}-{number}" for number in range(sizes[shard]))

    samples = in_order()
    for number in range(1000):
        block = list(islice(samples, min(window, first * 2**number)))
        yield from (block[i] for i in permutation(derive_seed(SEED, "window", lane, number), len(block)))


@given(sizes, st.sampled_from([1, 3, 8]), st.sampled_from([1, 7, 50]), st.sampled_from([1, 3, 64]), st.data())
@settings(max_examples=80, deadline=None)
def test_a_lane_is_the_plain_reference_and_goes_on_after_any_stop(sizes, lanes, window, first, data):
    number = data.draw(st.integers(0, lanes - 1))
    plain = expected(sizes, number, lanes, window, first)
    lane = make(sizes, number, lanes, window, first=first)
    for _ in range(data.draw(st.integers(1, 5))):
        count = data.draw(st.integers(0, 40))
        assert keys(lane, count) == list(islice(plain, count))
        state = LaneState.from_json(json.loads(json.dumps(lane.state.as_json())))
        lane = make(sizes, number, lanes, window, state, first=first)  # of another process


@given(sizes, st.sampled_from([1, 3, 8]), st.sampled_from([1, 7, 50]))
@settings(max_examples=30, deadline=None)
def test_all_lanes_together_have_every_sample_of_an_epoch_once(sizes, lanes, window):
    seen = Counter()
    for number in range(lanes):
        lane, epochs = make(sizes, number, lanes, window), []
        while len(epochs) < 2 * window or min(epochs[-2 * window :]) < 2:
            entry = lane.take()
            epochs.append(entry.at.epoch)
            if entry.at.epoch < 2:
                seen[entry.at.epoch, entry.found.key] += 1
    assert seen == Counter(
        {(epoch, f"{shard}-{n}"): 1 for epoch in (0, 1) for shard, size in enumerate(sizes) for n in range(size)}
    )


def test_a_window_ends_at_its_bytes_too():
    sizes = [10] * 4
    assert keys(make(sizes, window=50, most_bytes=7), 30) == keys(make(sizes, window=3), 30)  # of 3 bytes each


def test_a_new_run_waits_for_a_small_window_only():
    """And no window has to be read in one go when the one before has been given out."""
    read = []

    def counted(shard):
        for found in reader([5000])(shard):
            read.append(found.key)
            yield found

    lane = make([5000], window=200, read=counted)
    before, most = 0, []
    for _ in range(64 + 128 + 200 + 100):
        lane.take()
        most.append(len(read) - before)
        before = len(read)
    assert most[0] == 64
    assert max(most[1:]) == 32  # two for each of 16
    assert len(read) == 64 + 128 + 200 + 200 + 96  # of the last window 100 were given, and as many read ahead, by 16


def test_going_on_reads_a_window_and_the_beginning_of_a_shard_again():
    sizes, reads = [10] * 8, []
    lane = make(sizes, window=5)
    before = keys(lane, 33)
    again = make(sizes, window=5, state=lane.state, reads=reads)
    assert keys(again, 1) == keys(make(sizes, window=5), 34)[-1:]
    # The 34th sample is in the window from the 31st to the 35th, which begins with the fourth shard.
    assert reads == permutation(derive_seed(SEED, "shards", 0), 8)[3:4].tolist()
    assert len(set(before)) == 33


def test_bad_samples_have_their_places():
    """So a run that goes on finds them again at the same place, and counts none twice."""
    bad = BadSample("no_image", "none")

    def read(shard):
        for found in reader([4] * 5)(shard):
            yield found._replace(sample=bad) if found.key.endswith("-2") else found

    whole = make([4] * 5, window=6, read=read)
    entries = [whole.take() for _ in range(30)]
    assert sum(entry.found.sample is bad for entry in entries[:20]) == 5
    for stop in range(30):
        lane = make([4] * 5, window=6, read=read)
        for _ in range(stop):
            lane.take()
        assert make([4] * 5, window=6, read=read, state=lane.state).take() == entries[stop]


@pytest.mark.parametrize(
    "fault",
    [
        BadSample("shard_unreadable", "no tar"),
        NotFetched("404", may_pass=False),
        NotFetched("503, eight times", may_pass=True),
    ],
)
def test_a_lost_shard_is_one_bad_sample_and_the_lane_goes_on(fault):
    sizes = [3] * 6
    lost = int(permutation(derive_seed(SEED, "shards", 0), 6)[2])
    lane = make(sizes, window=1, gone={lost: (1, fault)})
    entries = [lane.take() for _ in range(17)]
    (at,) = (number for number, entry in enumerate(entries) if entry.found.key is None)
    assert (at, entries[at].found.sample, entries[at].shard) == (7, fault, lost)
    others = [entry.found.key for entry in entries if entry.found.key]
    assert others == [key for key in keys(make(sizes, window=1), 18) if key not in (f"{lost}-1", f"{lost}-2")]


def test_in_an_outage_the_lane_gives_what_it_has_and_stays_there():
    """Afterwards it goes on as if nothing had been."""
    sizes = [4] * 6
    gone, patience = {}, Patience(0.0)  # the first shard that does not come ends the patience
    lane = make(sizes, window=5, gone=gone, patience=patience)
    plain = keys(make(sizes, window=5), 60)
    given = keys(lane, 7)
    gone.update({shard: (0, NotFetched("no connection", may_pass=True)) for shard in range(6)})
    with pytest.raises(OutOfReachError, match="no connection"):  # noqa: PT012 - what came before counts
        while True:
            given += keys(lane, 1)
    assert len(given) >= 10  # the rest of the window
    assert given == plain[: len(given)]
    with pytest.raises(OutOfReachError):
        lane.take()
    stopped = lane.state
    gone.clear()
    assert keys(make(sizes, window=5, state=stopped), 30) == plain[len(given) :][:30]
    patience.recover()
    assert keys(lane, 30) == plain[len(given) :][:30]


def test_shards_that_were_given_up_before_the_outage_was_seen_are_not_lost():
    """Half of the patience is spent on each shard: two are given up before it is at its end."""
    sizes = [4] * 6
    gone = {shard: (0, NotFetched("no connection", may_pass=True)) for shard in range(6)}

    class Counted(Patience):
        def waited(self, seconds):
            super().waited(self.for_a_shard_s)  # as long as it may

    patience = Counted(1.0)
    lane = make(sizes, window=1, patience=patience)
    lane._read_shard = reader(sizes, gone)
    with pytest.raises(OutOfReachError):
        lane.take()
    assert lane.state == LaneState()
    gone.clear()
    patience.recover()
    assert keys(lane, 24) == keys(make(sizes, window=1), 24)


def test_where_nothing_may_be_skipped_a_shard_that_does_not_come_is_an_outage():
    fault = NotFetched("503", may_pass=True)
    lane = make([3] * 4, gone=dict.fromkeys(range(4), (0, fault)), skip=False)
    with pytest.raises(OutOfReachError) as caught:
        lane.take()
    assert caught.value.cause is fault


def filtered(sizes, wanted):
    """Shards in memory of which only some samples are wanted."""

    def read(shard):
        for found in reader(sizes)(shard):
            yield found if wanted(found.key) else found._replace(sample=None)

    return read


@given(sizes, st.sampled_from([1, 3]), st.sampled_from([1, 7]), st.integers(2, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_not_wanted_is_as_if_it_was_not_there(sizes, lanes, window, every, data):
    """But places keep their numbers, and a lane goes on after any stop."""

    def wanted(key):
        return sum(map(int, key.split("-"))) % every != 1

    def in_order():
        for epoch in range(1000):
            for shard in permutation(derive_seed(SEED, "shards", epoch), len(sizes))[number::lanes].tolist():
                keys_of = [(f"{shard}-{n}", n) for n in range(sizes[shard])]
                yield from ((key, n) for key, n in keys_of if wanted(key))

    def plain():
        samples = in_order()
        for block_number in range(1000):
            block = list(islice(samples, window))
            order = permutation(derive_seed(SEED, "window", number, block_number), window)
            yield from (block[i] for i in order)

    number = data.draw(st.integers(0, lanes - 1))
    read, following = filtered(sizes, wanted), plain()
    lane = make(sizes, number, lanes, window, read=read)
    for _ in range(data.draw(st.integers(1, 4))):
        for key, place in islice(following, data.draw(st.integers(0, 25))):
            entry = lane.take()
            assert (entry.found.key, entry.at.sample) == (key, place)
        state = LaneState.from_json(json.loads(json.dumps(lane.state.as_json())))
        lane = make(sizes, number, lanes, window, state, read=read)


def test_what_is_not_wanted_is_counted_once_and_in_a_row():
    lane = make([10] * 4, window=1, read=filtered([10] * 4, lambda key: key.endswith("-9")))
    lane.take()
    assert (lane.left_out, lane.left_out_in_a_row) == (9, 0)
    again = make([10] * 4, window=1, state=lane.state, read=filtered([10] * 4, lambda key: key.endswith("-9")))
    again.take()
    assert again.left_out == 9  # those before its cursor are skipped, not counted
    never = iter(range(45))

    def read(shard):
        for found in reader([10] * 4)(shard):
            next(never)  # or a lane would read for ever
            yield found._replace(sample=None)

    endless = make([10] * 4, window=1, read=read)
    with pytest.raises(RuntimeError):
        endless.take()
    assert (endless.left_out_in_a_row, endless.shards_in_a_row) == (45, 4)
    # Of shards that cannot be read, nothing was left out.
    lost = make([10] * 4, gone={shard: (0, BadSample("shard_unreadable", "no tar")) for shard in range(4)})
    assert [lost.take().found.key for _ in range(5)] == [None] * 5
    assert lost.shards_in_a_row == 0


def test_a_shard_of_which_nothing_is_wanted_has_come():
    """So those before it that could not be fetched are lost, and in an outage the lane does not go back to them."""
    order, patience = permutation(derive_seed(SEED, "shards", 0), 4).tolist(), Patience()

    def read(shard):
        if shard == order[2]:
            patience.give_up()
        if shard in (order[0], order[2]):
            raise NotFetched("no", may_pass=True)
        yield from (found._replace(sample=None) for found in reader([3] * 4)(shard))

    lane = make([3] * 4, window=1, read=read, patience=patience)
    first = lane.take()
    assert first.shard == order[0]
    assert isinstance(first.found.sample, NotFetched)
    with pytest.raises(OutOfReachError):
        lane.take()
    assert lane.state.start.shard == 2
