"""Training from archives whose index another tool wrote: exact order and resuming, and counts that are wrong."""

import json
from collections import Counter

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.train import train
from tests.data import foreign_shards
from tests.data.batches.common import make_batches, same, shown

COUNTS = (3, 5, 4)


def from_(root, **more):
    """The data section that reads unlabelled samples from an archive."""
    return {"unlabelled": [{"root": str(root), "name": "theirs"}], **more}


@pytest.mark.parametrize("layout", ["img2dataset", "wids", "energon", "text"])
def test_a_run_stops_and_continues_exactly(make_recipe, tmp_path, layout):
    root = foreign_shards.LAYOUTS[layout](tmp_path / "archive")
    samples = sum(foreign_shards.COUNTS)
    first = make_batches(make_recipe, data=from_(root))
    seen = [place for side, _, epoch, place in shown(first, 0, samples // 2) if (side, epoch) == ("unlabelled", 0)]
    assert sorted(seen) == list(range(samples))
    state = json.loads(json.dumps(first.state(3)))
    again = make_batches(make_recipe, data=from_(root))
    again.resume(state)
    assert all(same(first[number], again[number]) for number in range(3, 9))
    assert not any(first[number].skipped for number in range(9))


def test_the_order_of_two_kinds_of_index_is_the_same(make_recipe, tmp_path):
    """Each says the same numbers; it does not matter who says them."""
    roots = [foreign_shards.LAYOUTS[name](tmp_path / name) for name in ("img2dataset", "wids", "open_clip", "text")]
    made = [make_batches(make_recipe, data=from_(root)) for root in roots]
    for number in range(6):
        assert all(same(made[0][number], other[number]) for other in made[1:])


def wrong(folder, count):
    """Shards of COUNTS samples, the second of which is said to have ``count``."""
    root = foreign_shards.img2dataset(folder, COUNTS)
    foreign_shards.note(folder / "00001.tar", count)
    return root


@pytest.mark.parametrize("said", [4, 7], ids=["too few", "too many"])
def test_a_wrong_count_is_counted_and_the_order_stays(make_recipe, tmp_path, said):
    samples = COUNTS[0] + said + COUNTS[2]
    made = make_batches(make_recipe, data=from_(wrong(tmp_path / "archive", said)))
    skips, read = [], Counter()
    (source,) = made.unlabelled.sources
    for number in range(samples):  # two epochs of images, two a step
        skips += made[number].skipped
        read.update(source.locate(place) for _, place in made.places(made.unlabelled, number))
    assert set(read.values()) == {2}
    assert len(read) == samples  # every place twice, whatever is behind it
    # Of too few samples, the places that there are none for; of too many, the last place stands for what is not read.
    places = range(COUNTS[1], said) if said > COUNTS[1] else [said - 1]
    assert Counter((skip.reason, skip.shard) for skip in skips) == {("wrong_count", "00001.tar"): 2 * len(places)}
    assert "5 samples where the index says" in skips[0].message
    again = make_batches(make_recipe, data=from_(tmp_path / "archive"))
    again.resume(json.loads(json.dumps(made.state(2))))
    assert all(same(made[number], again[number]) for number in range(2, samples))


@pytest.mark.parametrize("said", [4, 7])
def test_a_wrong_count_ends_a_run_that_may_skip_nothing(make_recipe, tmp_path, said):
    made = make_batches(make_recipe, data=from_(wrong(tmp_path / "archive", said), bad_unlabelled="fail"))
    with pytest.raises(DataError, match=rf"00001\.tar: 5 samples where the index says {said}"):
        list(map(made.__getitem__, range(8)))


def test_a_run_trains_from_a_folder_of_img2datasets(make_recipe, tmp_path):
    root = wrong(tmp_path / "archive", 6)
    data = from_(root, max_bad_share=0.5)
    run = train(make_recipe(data=data, run={"steps": 7, "evaluate_every": 0}))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(record.get("skipped", {}).get("wrong_count", 0) for record in records) >= 1
    listed = [json.loads(line) for line in (run / "skipped" / "rank-0.jsonl").read_text().splitlines()]
    assert {entry["reason"] for entry in listed} == {"wrong_count"}
