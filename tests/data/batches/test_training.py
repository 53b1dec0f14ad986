"""Batches are exact and the same whatever ranks, workers and restarts; a run continues exactly where it stopped."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import ShardIndex
from tests.conftest import ShapesSource, recipe_maker, write_shards
from tests.data.batches.common import make_batches, same, shown


def test_two_ranks_share_out_the_batch_of_one(make_recipe):
    alone = make_batches(make_recipe, engine={"micro_batch": 4}, data={"lanes": 2})
    ranks = [make_batches(make_recipe, rank, 2, engine={"micro_batch": 2}) for rank in (0, 1)]
    for number in range(5):
        whole, halves = alone[number], [rank[number] for rank in ranks]
        assert whole.labels.equal(torch.cat([half.labels for half in halves]))
        assert whole.labelled_images.equal(torch.cat([half.labelled_images for half in halves]))
        assert whole.unlabelled_images.equal(torch.cat([half.unlabelled_images for half in halves]))
        assert whole.positions == halves[0].positions + halves[1].positions


def test_the_state_continues_the_same_batches(make_recipe):
    first = make_batches(make_recipe)
    state = json.loads(json.dumps(first.state(4)))
    again = make_batches(make_recipe)
    again.resume(state)
    assert all(same(first[number], again[number]) for number in range(4, 8))


def test_exact_mix_and_nothing_unlabelled_in_the_burn_in(make_recipe):
    recipe = {"data": {"unlabelled_per_labelled": 3}, "method": {"burn_in": 0.5}, "run": {"steps": 4}}
    made = make_batches(make_recipe, **recipe)
    sizes = [(len(b.labelled_images), len(b.unlabelled_images)) for b in load_batches(made, 0, 4)]
    assert sizes == [(2, 0), (2, 0), (2, 6), (2, 6)]
    # The first unlabelled image is the first of its epoch: the burn-in used none up.
    assert next(p for side, *p in shown(made, 2, 3) if side == "unlabelled") == ["unlabelled", 0, 0]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_unlabelled_sample_once_an_epoch_over_ranks(make_recipe, accumulation):
    engine = {"micro_batch": 1, "accumulation": accumulation}
    ranks = [make_batches(make_recipe, rank, 2, engine=engine) for rank in (0, 1)]
    seen = [s for rank in ranks for s in shown(rank, 0, 12) if s[0] == "unlabelled"]
    assert sorted(place for *_, place in seen) == list(range(24))
    assert {epoch for _, _, epoch, _ in seen} == {0}
    # Each rank reads shards of its own, but for the one that the cut goes through.
    shards = [
        {source.locate(place)[0] for n in range(12) for source, place in rank.places(rank.unlabelled, n)}
        for rank in ranks
    ]
    assert len(shards[0] & shards[1]) <= 1


@given(
    layouts=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 7)), min_size=1, max_size=4
    ),
    window=st.sampled_from([1, 3, 1000]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stopping_anywhere_and_going_on_with_other_ranks_loses_nothing(shapes, tmp_path, layouts, window):
    """Ranks, batch, accumulation and the stop differ from leg to leg; every epoch is seen whole, once."""
    make_recipe = recipe_maker(shapes, tmp_path)
    state, step, seen = None, 0, Counter()
    for world_size, micro_batch, accumulation, steps in layouts:
        engine = {"micro_batch": micro_batch, "accumulation": accumulation}
        ranks = [
            make_batches(make_recipe, rank, world_size, engine=engine, data={"shuffle_window": window})
            for rank in range(world_size)
        ]
        for rank in ranks:
            if state is not None:
                rank.resume(state)
            seen.update(shown(rank, step * accumulation, (step + steps) * accumulation))
        states = [json.loads(json.dumps(rank.state(step + steps))) for rank in ranks]
        assert all(other == states[0] for other in states)
        state, step = states[0], step + steps
    assert max(seen.values(), default=1) == 1
    for side, samples in (("labelled", 8), ("unlabelled", 24)):
        total = sum(n for (s, *_), n in seen.items() if s == side)
        assert {(0, p) for p in range(samples)} <= {(e, p) for s, _, e, p in seen if s == side} or total < samples + 4


def test_weighted_sources_on_each_side(make_recipe, shapes, tmp_path):
    write_shards(
        ShapesSource({"labelled": 3, "unlabelled": 7}, name="others"), tmp_path / "o", workers=1, progress=False
    )
    second = {"root": str(tmp_path / "o"), "name": "second"}
    data = {
        "labelled": [{"root": str(shapes)}, second],
        "unlabelled": [{"root": str(shapes), "weight": 3}, second | {"weight": 1}],
    }
    mixed = make_batches(make_recipe, data=data, engine={"micro_batch": 4})
    assert (mixed.labelled_samples, mixed.unlabelled_samples) == (11, 31)
    for number in range(8):
        names = Counter((side, name) for side, name, *_ in shown(mixed, number, number + 1))
        assert names == {
            ("labelled", "labelled"): 2,
            ("labelled", "second"): 2,
            ("unlabelled", "unlabelled"): 3,
            ("unlabelled", "second"): 1,
        }
    assert len(mixed[0].labels) == 4


@pytest.mark.parametrize("world_size", [3, 9])
def test_more_ranks_than_samples_or_shards(make_recipe, world_size):
    ranks = [
        make_batches(make_recipe, rank, world_size, data={"labelled_count": 2}, engine={"micro_batch": 1})
        for rank in range(world_size)
    ]
    places = Counter(s[2:] for rank in ranks for s in shown(rank, 0, 2) if s[0] == "labelled")
    assert places == dict.fromkeys([(e, p) for e in range(world_size) for p in (0, 1)], 1)
    assert len(ranks[-1][0].labels) == 1


def test_no_labelled_images_at_all(make_recipe):
    recipe = make_recipe(data={"labelled_count": 0}, model={"backbone": "transformers/segformer-b0", "pretrained": "x"})
    batch = TrainingBatches(recipe, 3, 0, 1, unlabelled=True)[0]
    assert batch.labelled_images.shape == (0, 3, 64, 64)
    assert batch.labels.shape == (0, 64, 64)
    assert len(batch.unlabelled_images) == 2


def test_label_value_of_no_class(make_recipe):
    narrow = TrainingBatches(make_recipe(), 2, 0, 1, unlabelled=False)
    with pytest.raises(DataError, match="label value 2"):
        list(load_batches(narrow, 0, 8))


def test_a_skipped_sample_is_named_and_another_takes_its_place(make_recipe, spoilt):
    data = {"root": str(spoilt), "bad_labelled": "skip"}
    made = list(load_batches(make_batches(make_recipe, data=data), 0, 12))
    assert all(len(b.labels) == 2 and len(b.unlabelled_images) == 2 for b in made)
    skips = [skip for b in made for skip in b.skipped]
    # 24 labelled images are three epochs; 24 unlabelled ones are one.
    met = Counter((s.source, s.key, s.reason) for s in skips)
    assert met.keys() == {
        ("labelled", "labelled-0000", "label_size"),
        ("unlabelled", "unlabelled-0004", "not_an_image"),
    }
    assert met["labelled", "labelled-0000", "label_size"] >= 3
    assert all(Path(spoilt, s.shard).is_file() for s in skips)
    # What stands in depends on the place alone.
    ranks = [make_batches(make_recipe, rank, 2, data=data, engine={"micro_batch": 1}) for rank in (0, 1)]
    pairs = make_batches(make_recipe, data=data | {"lanes": 2})
    for number in range(12):
        assert pairs[number].labels.equal(torch.cat([rank[number].labels for rank in ranks]))


def test_nothing_usable_at_all(make_recipe, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "rubbish")
    for shard in ShardIndex.load(root).streams["unlabelled"].shards:
        (root / shard.file).write_bytes(b"rubbish" * 300)
    with pytest.raises(DataError, match=r"\d\d samples in a row cannot be used"):
        make_batches(make_recipe, data={"root": str(root)})[0]
