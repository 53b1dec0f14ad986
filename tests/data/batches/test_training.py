"""Batches are exact and the same whatever ranks, workers and restarts; a run continues exactly where it stopped."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.batches.loading import batches
from maskmatch_scale.data.batches.stream import TrainingStream, draw_labelled
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.method.maskmatch import class_weights
from tests.conftest import ShapesSource, recipe_maker, rewrite_shard, write_shards


def stream(make_recipe, rank=0, world_size=1, **sections):
    return TrainingStream(make_recipe(**sections), 3, rank, world_size, unlabelled=True)


def same(one, other):
    return one.unlabelled_positions == other.unlabelled_positions and all(
        getattr(one, name).equal(getattr(other, name))
        for name in ("labelled_images", "labels", "unlabelled_images", "unlabelled_valid")
    )


def shown(stream, start, stop):
    """(side, source, epoch, place) of everything that one rank shows in these micro-batches."""
    sides = {"labelled": stream.labelled, "unlabelled": stream.unlabelled}
    return [
        (side, source.name, place.epoch, place.place)
        for number in range(start, stop)
        for side, of_side in sides.items()
        for source, place in stream._places(of_side, number)
    ]


def test_two_ranks_share_out_the_batch_of_one(make_recipe):
    alone = stream(make_recipe, engine={"micro_batch": 4}, data={"lanes": 2})
    ranks = [stream(make_recipe, rank, 2, engine={"micro_batch": 2}) for rank in (0, 1)]
    for number in range(5):
        whole, halves = alone[number], [rank[number] for rank in ranks]
        assert whole.labels.equal(torch.cat([half.labels for half in halves]))
        assert whole.labelled_images.equal(torch.cat([half.labelled_images for half in halves]))
        assert whole.unlabelled_images.equal(torch.cat([half.unlabelled_images for half in halves]))
        assert whole.unlabelled_positions == halves[0].unlabelled_positions + halves[1].unlabelled_positions


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_restarts_change_nothing(make_recipe, workers):
    plain = list(batches(stream(make_recipe), 0, 6))
    loaded = list(batches(stream(make_recipe, data={"workers": workers}), 0, 6))
    continued = list(batches(stream(make_recipe, data={"workers": workers}), 4, 6))
    assert all(map(same, plain, loaded))
    assert all(map(same, plain[4:], continued))


def test_a_batch_stays_as_it_is_when_later_ones_are_loaded(make_recipe):
    """Loader processes hand batches over in slots that they use again."""
    plain = list(batches(stream(make_recipe), 0, 24))
    kept = []
    for batch in batches(stream(make_recipe, data={"workers": 2}), 0, 24):
        kept.append(batch)
    assert all(map(same, plain, kept))


def test_the_state_continues_the_same_batches(make_recipe):
    first = stream(make_recipe)
    state = json.loads(json.dumps(first.state(4)))
    again = stream(make_recipe)
    again.resume(state)
    assert all(same(first[number], again[number]) for number in range(4, 8))


def test_exact_mix_and_nothing_unlabelled_in_the_burn_in(make_recipe):
    recipe = {"data": {"unlabelled_per_labelled": 3}, "method": {"burn_in": 0.5}, "run": {"steps": 4}}
    made = stream(make_recipe, **recipe)
    sizes = [(len(b.labelled_images), len(b.unlabelled_images)) for b in batches(made, 0, 4)]
    assert sizes == [(2, 0), (2, 0), (2, 6), (2, 6)]
    # The first unlabelled image is the first of its epoch: the burn-in used none up.
    assert next(p for side, *p in shown(made, 2, 3) if side == "unlabelled") == ["unlabelled", 0, 0]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_unlabelled_sample_once_an_epoch_over_ranks(make_recipe, accumulation):
    engine = {"micro_batch": 1, "accumulation": accumulation}
    ranks = [stream(make_recipe, rank, 2, engine=engine) for rank in (0, 1)]
    seen = [s for rank in ranks for s in shown(rank, 0, 12) if s[0] == "unlabelled"]
    assert sorted(place for *_, place in seen) == list(range(24))
    assert {epoch for _, _, epoch, _ in seen} == {0}
    # Each rank reads shards of its own, but for the one that the cut goes through.
    shards = [
        {source.locate(place)[0] for n in range(12) for source, place in rank._places(rank.unlabelled, n)}
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
            stream(make_recipe, rank, world_size, engine=engine, data={"shuffle_window": window})
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
    mixed = stream(make_recipe, data=data, engine={"micro_batch": 4})
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


def test_sources_that_do_not_fit(make_recipe, shapes, tmp_path):
    other = ShapesSource({"labelled": 3}, classes=("x", "y", "z"))
    write_shards(other, tmp_path / "o", workers=1, progress=False)
    with pytest.raises(DataError, match="its classes or its ignore_index are not those of"):
        stream(make_recipe, data={"labelled": [{"root": str(tmp_path / "o")}]})
    with pytest.raises(DataError, match=r"data\.unlabelled: two sources are called 'unlabelled'"):
        stream(make_recipe, data={"unlabelled": [{"root": str(shapes)}, {"root": str(shapes)}]})


def test_a_labelled_stream_serves_as_unlabelled(make_recipe, shapes):
    data = {"unlabelled": [{"root": str(shapes), "stream": "labelled", "name": "again"}]}
    assert len(stream(make_recipe, data=data)[0].unlabelled_images) == 2


def test_labelled_draw():
    draws = {tuple(draw_labelled([8], 3, seed)[0].tolist()) for seed in range(6)}
    assert len(draws) > 1
    assert all(len(set(draw)) == 3 and max(draw) < 8 for draw in draws)
    assert draw_labelled([8, 5], None, 0) == [None, None]
    both = [part.tolist() for part in draw_labelled([8, 5], 6, 1)]
    assert sum(map(len, both)) == 6
    assert max(both[1]) < 5
    with pytest.raises(DataError, match=r"data\.labelled_count=9: there are 8"):
        draw_labelled([8], 9, 0)


def test_only_drawn_samples_are_ever_shown(make_recipe):
    few = stream(make_recipe, data={"labelled_count": 2}, engine={"micro_batch": 4})
    (source,) = few.labelled.sources
    places = [place for number in range(30) for _, place in few._places(few.labelled, number)]
    starts = source.stream.shards.starts
    numbers = Counter(int(starts[shard]) + within for shard, within in map(source.locate, places))
    assert numbers == dict.fromkeys(source.numbers.tolist(), 60)


@pytest.mark.parametrize("world_size", [3, 9])
def test_more_ranks_than_samples_or_shards(make_recipe, world_size):
    ranks = [
        stream(make_recipe, rank, world_size, data={"labelled_count": 2}, engine={"micro_batch": 1})
        for rank in range(world_size)
    ]
    places = Counter(s[2:] for rank in ranks for s in shown(rank, 0, 2) if s[0] == "labelled")
    assert places == dict.fromkeys([(e, p) for e in range(world_size) for p in (0, 1)], 1)
    assert len(ranks[-1][0].labels) == 1


def test_lanes_that_do_not_divide_the_batch(make_recipe):
    with pytest.raises(DataError, match=r"data\.lanes=3 does not divide the 4 images that 2 ranks take"):
        stream(make_recipe, 0, 2, data={"lanes": 3})


def test_no_labelled_images_at_all(make_recipe):
    recipe = make_recipe(data={"labelled_count": 0}, model={"backbone": "transformers/segformer-b0", "pretrained": "x"})
    batch = TrainingStream(recipe, 3, 0, 1, unlabelled=True)[0]
    assert batch.labelled_images.shape == (0, 3, 64, 64)
    assert batch.labels.shape == (0, 64, 64)
    assert len(batch.unlabelled_images) == 2


def test_class_pixels_count_the_drawn_samples_alone(make_recipe, shapes):
    few = stream(make_recipe, data={"labelled_count": 2})
    (source,) = few.labelled.sources
    labels = [few._label(source.stream[number]) for number in source.numbers.tolist()]
    total = sum(torch.bincount(label.flatten().long(), minlength=256)[:3] for label in labels)
    assert few.class_pixels().equal(total)
    weights = class_weights(few.class_pixels())
    assert torch.isclose((weights * total / total.sum()).sum(), torch.tensor(1.0))


def test_label_value_of_no_class(make_recipe):
    narrow = TrainingStream(make_recipe(), 2, 0, 1, unlabelled=False)
    with pytest.raises(DataError, match="label value 2"):
        list(batches(narrow, 0, 8))


@pytest.fixture
def spoilt(shapes, tmp_path):
    """Shards whose first labelled sample has a label map of another size, and whose 5th unlabelled one is cut short."""
    root = shutil.copytree(shapes, tmp_path / "spoilt")
    index = ShardIndex.load(root)
    rewrite_shard(root, index.streams["labelled"].shards[0].file, {"labelled-0000.png": small_label()})
    unlabelled = ShardStream(root, "unlabelled", recipe_maker(shapes, tmp_path)().data)
    raw = unlabelled[4]
    rewrite_shard(root, raw.shard, {f"{raw.key}.webp": raw.image[: len(raw.image) // 2]})
    return root


def small_label():
    import io

    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_labelled_sample_is_one_line_also_from_a_worker(make_recipe, spoilt, workers):
    bad = stream(make_recipe, data={"root": str(spoilt), "workers": workers})
    with pytest.raises(DataError, match="labelled-0000") as caught:
        list(batches(bad, 0, 8))
    assert "\n" not in str(caught.value)


def test_a_skipped_sample_is_named_and_another_takes_its_place(make_recipe, spoilt):
    data = {"root": str(spoilt), "bad_labelled": "skip"}
    made = list(batches(stream(make_recipe, data=data), 0, 12))
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
    ranks = [stream(make_recipe, rank, 2, data=data, engine={"micro_batch": 1}) for rank in (0, 1)]
    pairs = stream(make_recipe, data=data | {"lanes": 2})
    for number in range(12):
        assert pairs[number].labels.equal(torch.cat([rank[number].labels for rank in ranks]))


def test_nothing_usable_at_all(make_recipe, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "rubbish")
    for shard in ShardIndex.load(root).streams["unlabelled"].shards:
        (root / shard.file).write_bytes(b"rubbish" * 300)
    with pytest.raises(DataError, match=r"\d\d samples in a row cannot be used"):
        stream(make_recipe, data={"root": str(root)})[0]
