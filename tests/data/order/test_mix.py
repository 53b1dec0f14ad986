"""A mix is exact over every stretch, and what it continues from loses nothing and repeats nothing."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order.mix import Leg, SourceInfo, counts, pick, shares

weights = st.lists(st.sampled_from([0.1, 0.25, 1.0, 2.0, 3.5]), min_size=1, max_size=4)


@given(weights=weights, lanes=st.integers(1, 6), data=st.data())
def test_every_source_has_its_share_at_any_time(weights, lanes, data):
    lane = data.draw(st.integers(0, lanes - 1))
    chances = shares(weights)
    had = Counter()
    for number in range(60):
        assert counts(chances, lane, lanes, number) == [had[source] for source in range(len(weights))]
        for source, weight in enumerate(weights):
            exact = number * Fraction(str(weight)) / sum(map(Fraction, map(str, weights)))
            assert abs(had[source] - exact) < max(1, len(weights) - 1)
        source, before = pick(chances, lane, lanes, number)
        assert before == had[source]
        had[source] += 1


def test_lanes_are_shifted_against_each_other():
    first = {pick(shares([1, 1]), lane, 4, 0)[0] for lane in range(4)}
    assert first == {0, 1}


@st.composite
def layouts(draw):
    lanes = draw(st.integers(1, 4))
    names = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
    sources = [
        SourceInfo(name, draw(st.sampled_from([0.5, 1.0, 3.0])), {"a": 7, "b": 1, "c": 23}[name], "") for name in names
    ]
    return lanes, lanes * draw(st.integers(1, 3)), sources


def shown(leg, first, last):
    return Counter(
        (leg.sources[source].name, place.epoch, place.place)
        for step in range(first, last)
        for lane in range(leg.lanes)
        for number in range(leg.per_lane)
        for source, place in [leg.at(step, lane, number)]
    )


@given(
    layouts=st.lists(st.tuples(layouts(), st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_everything_may_change_where_a_run_continues(layouts):
    """Ranks, batches, weights, sources and the end of the burn-in: no sample is lost, none comes twice.

    A source that is away for a while is forgotten, so what is looked at are those that are always there. The state
    goes through JSON.
    """
    (lanes, batch, sources), _, start = layouts[0]
    leg, step, total = Leg.first(start, lanes, batch, sources), 0, Counter()
    for (lanes, batch, sources), steps, start in layouts:
        leg = Leg.from_json(leg.as_json()).next(step, start, lanes, batch, sources)
        assert leg.start <= step or leg.start == max(start, step)
        total += shown(leg, max(step, leg.start), step + steps)
        step += steps
    always = set.intersection(*({source.name for source in layout[2]} for layout, _, _ in layouts))
    begun = {name: max((e for n, e, _ in total if n == name), default=-1) for name in always}
    # Go on as it is until every epoch that was begun must be over.
    weight = sum(source.weight for source in leg.sources)
    steps = max((2 * source.samples + 4 * leg.lanes) * weight / source.weight / leg.batch for source in leg.sources)
    step = max(step, leg.start)
    total += shown(leg, step, step + int(steps) + 2)
    for source in leg.sources:
        if source.name in always:
            for epoch in range(begun[source.name] + 1):
                seen = {place: n for (name, e, place), n in total.items() if (name, e) == (source.name, epoch)}
                assert seen == dict.fromkeys(range(source.samples), 1)


@given(layout=layouts(), steps=st.integers(0, 20))
def test_the_prefix_of_an_epoch_is_complete(layout, steps):
    """Epochs are gone through in turn: an epoch is whole before the one after the next begins."""
    lanes, batch, sources = layout
    seen = shown(Leg.first(0, lanes, batch, sources), 0, steps)
    for source in sources:
        epochs = sorted({epoch for name, epoch, _ in seen if name == source.name})
        # Lanes of a mix are less than two samples apart.
        behind = -(-2 * lanes // source.samples) + 1
        for epoch in epochs[:-behind]:
            assert sum(n for (name, e, _), n in seen.items() if (name, e) == (source.name, epoch)) == source.samples


def test_an_unchanged_layout_continues_the_same_leg():
    sources = [SourceInfo("a", 1.0, 10, "x"), SourceInfo("b", 2.0, 5, "y")]
    leg = Leg.first(3, 2, 4, sources)
    assert Leg.from_json(leg.as_json()).next(17, 3, 2, 4, sources) == leg


def test_burn_in_that_ends_elsewhere():
    sources = [SourceInfo("a", 1.0, 10, "x")]
    moved = Leg.first(5, 2, 4, sources).next(2, 8, 2, 4, sources)
    assert moved == Leg.first(8, 2, 4, sources)
    under_way = Leg.first(5, 2, 4, sources).next(6, 8, 2, 4, sources)
    assert under_way.start == 8
    assert sum(i.stop - i.start for i in under_way.queues[0].left) == 6


@pytest.mark.parametrize(("start", "stops"), [(10, [(7, 5)]), (5, [(6, 10), (7, 5)]), (5, [(9, 3), (12, 20), (15, 2)])])
def test_the_first_sample_after_a_change_of_burn_in(start, stops):
    """What the review found: a leg must not begin with a step that is over."""
    sources = [SourceInfo("a", 1.0, 1000, "x")]
    leg, step, places = Leg.first(start, 2, 4, sources), 0, []
    for until, start in stops:
        places += [
            leg.at(s, lane, n)[1].place for s in range(max(step, leg.start), until) for lane in (0, 1) for n in (0, 1)
        ]
        leg, step = leg.next(until, start, 2, 4, sources), until
    places += [leg.at(s, lane, n)[1].place for s in range(max(step, leg.start), 40) for lane in (0, 1) for n in (0, 1)]
    of_lanes = [sorted(p for p in places if (p >= 500) == lane) for lane in (False, True)]
    assert of_lanes == [list(range(len(places) // 2)), list(range(500, 500 + len(places) // 2))]


def test_other_shards_begin_a_new_epoch():
    leg = Leg.first(0, 1, 4, [SourceInfo("a", 1.0, 10, "old")])
    now = [SourceInfo("a", 1.0, 12, "new")]
    assert leg.changed(now) == ["a"]
    continued = leg.next(2, 0, 1, 4, now)
    assert continued.at(2, 0, 0)[1] == (1, 1, 0)


def test_nonsense_is_one_line():
    with pytest.raises(DataError, match="stream state cannot be read"):
        Leg.from_json({"lanes": 2})
