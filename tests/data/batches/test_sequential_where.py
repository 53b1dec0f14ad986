"""`where` and `part` of sources without an index: filtered while they are read, continued exactly, never for ever."""

import json
from collections import Counter
from contextlib import closing
from itertools import islice

import pytest

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order import sequential as sequential_module
from maskmatch_scale.seeds import derive_seed
from tests.data import bad_shards
from tests.data.batches.archive import SIZES, make, place_of, sequential, state_of_all, taken
from tests.data.batches.common import same

PLACES = place_of(epochs=30)
WANTED = {(shard, number) for shard, size in enumerate(SIZES) for number in range(size) if (shard + number) % 3}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """As `write_archive` has it, but samples whose shard and number make a multiple of 3 are narrow."""
    folder = tmp_path_factory.mktemp("widths")
    for shard, size in enumerate(SIZES):
        members = [
            member
            for number in range(size)
            for member in [
                *bad_shards.sample(f"{shard:03d}{number:06d}", 10 * shard + number, labelled=False),
                (
                    f"{shard:03d}{number:06d}.json",
                    json.dumps({"width": 700 if (shard + number) % 3 else 300}).encode(),
                ),
            ]
        ]
        (folder / f"a-{shard:03d}.tar").write_bytes(bad_shards.tar_bytes(members))
    return folder


def wide(archive, **more):
    return [sequential(archive, where="width >= 512", **more)]


def places(batches):
    return [PLACES[position] for batch in batches for position in batch.positions]


def test_only_what_matches_is_given_each_once_an_epoch(make_recipe, archive):
    made = make(make_recipe, archive, source=wide(archive), shuffle_window=1)
    batches = taken(made, 0, len(WANTED))
    seen = Counter(places(batches))
    assert set(seen.values()) == {1}
    assert {(shard, number) for epoch, shard, number in seen if epoch == 0} == WANTED
    assert {(shard, number) for _, shard, number in seen} == WANTED
    read = sum(SIZES) * 2 - 2 * len(WANTED)
    left_out = sum(batch.fetched.left_out for batch in batches)
    assert abs(left_out - read) <= 3  # what is read ahead
    assert made.notes == ["unlabelled source 'archive': 8 of 8 shards (where width >= 512)"]


@pytest.mark.parametrize(("before", "after", "stop"), [(0, 2, 1), (2, 0, 7), (2, 4, 8), (1, 2, 19)])
def test_a_run_goes_on_exactly_with_any_processes(make_recipe, archive, before, after, stop):
    plain = taken(make(make_recipe, archive, source=wide(archive), sequential_lanes=4), 0, 30)
    first = make(make_recipe, archive, source=wide(archive), sequential_lanes=4, workers=before)
    with closing(load_batches(first, 0, 30)) as loaded:
        assert all(same(one, other) for one, other in zip(islice(loaded, stop), plain, strict=False))
    again = make(make_recipe, archive, source=wide(archive), workers=after)
    again.resume(json.loads(json.dumps(state_of_all([first], stop))))
    with closing(load_batches(again, stop, 30)) as loaded:
        for one, other in zip(loaded, plain[stop:], strict=True):
            assert same(one, other)
            assert one.lanes == other.lanes


def test_another_condition_begins_a_new_epoch(make_recipe, archive, caplog):
    first = make(make_recipe, archive, source=wide(archive))
    taken(first, 0, 3)
    state = state_of_all([first], 3)
    for source in ([sequential(archive)], [sequential(archive, where="width > 600")], wide(archive, part=0.6)):
        caplog.clear()
        make(make_recipe, archive, source=source).resume(state)
        assert "'archive' is not as it was at step 3: it begins a new epoch" in caplog.text


def test_a_part_is_of_shards(make_recipe, archive):
    seen = {}
    for part in (0.25, 0.5):
        made = make(make_recipe, archive, source=[sequential(archive, part=part)], shuffle_window=1)
        seen[part] = shards_of(made, taken(made, 0, 30))
        count = round(part * len(SIZES))
        assert made.notes == [f"unlabelled source 'archive': {count} of 8 shards (part {part})"]
        assert len(seen[part]) == count
    assert seen[0.25] < seen[0.5]
    other = make(make_recipe, archive, source=[sequential(archive, part=0.25)], split_seed=3)
    assert shards_of(other, taken(other, 0, 30)) != seen[0.25]


def shards_of(made, batches):
    """The files that the samples of a part are of; a part numbers its shards anew."""
    (source,) = made.sequential
    numbers = {
        derive_seed(0, "place", "archive", epoch, shard * (1 << 32) + number): shard
        for epoch in range(40)
        for shard in range(len(source))
        for number in range(max(SIZES))
    }
    return {source.location(numbers[position]) for batch in batches for position in batch.positions}


@pytest.mark.parametrize(
    ("limits", "where", "message"),
    [
        ({}, "width > 5000", r"source 'archive': where 'width > 5000': none of \d+ samples is like that; choose"),
        ({"_MOST_LEFT_OUT": 40}, "width > 5000", r"none of 4\d samples is like that"),
        ({"_LEFT_OUT_WITHOUT_A_FIELD": 10}, "widht > 5", r"none of 11 samples has a field 'widht'; there are width$"),
    ],
)
def test_where_nothing_matches_the_run_ends(make_recipe, archive, monkeypatch, limits, where, message):
    for name, limit in limits.items():
        monkeypatch.setattr(sequential_module, name, limit)
    made = make(make_recipe, archive, source=[sequential(archive, where=where)])
    with pytest.raises(DataError, match=message) as caught:
        taken(made, 0, 1)
    assert "\n" not in str(caught.value)


def test_a_part_of_one_shard_is_refused(make_recipe, archive):
    source = [sequential(archive, part=0.5) | {"shards": f"{archive}/a-000.tar"}]
    with pytest.raises(DataError, match=r"source 'archive': part=0\.5 of a single shard: .*shards index"):
        make(make_recipe, archive, source=source)


def test_archives_without_metadata(make_recipe, tmp_path, monkeypatch):
    for shard in range(4):
        (tmp_path / f"b-{shard}.tar").write_bytes(bad_shards.whole(5, labelled=False))
    monkeypatch.setattr(sequential_module, "_LEFT_OUT_WITHOUT_A_FIELD", 10)
    source = [{"shards": f"{tmp_path}/b-*.tar", "name": "b", "where": "width > 3"}]
    with pytest.raises(DataError, match=r"none of 11 samples has a \.json member with metadata; leave the filter out"):
        taken(make(make_recipe, tmp_path, source=source), 0, 1)
