"""The order is a pure function of (seed, epoch, position); ranks, workers and restarts change nothing."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.index import ShardIndex
from maskmatch_scale.data.shards import ShardStream
from maskmatch_scale.data.stream import Order, TrainingStream, batches, draw_labelled, evaluation_samples
from maskmatch_scale.method.maskmatch import class_weights


@given(length=st.integers(1, 50), seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_every_sample_once_an_epoch(length, seed, epochs):
    order = Order(range(length), seed, "unlabelled")
    for epoch in range(epochs):
        assert sorted(order[epoch * length + place] for place in range(length)) == list(range(length))


def test_epochs_streams_and_seeds_differ():
    orders = [Order(range(40), 1, "a"), Order(range(40), 1, "b"), Order(range(40), 2, "a")]
    sequences = {tuple(order[place] for place in range(40)) for order in orders}
    sequences.add(tuple(orders[0][place] for place in range(40, 80)))
    assert len(sequences) == 4


def stream(make_recipe, rank=0, world_size=1, **sections):
    return TrainingStream(make_recipe(**sections), 3, rank, world_size, unlabelled=True)


def same(one, other):
    return all(
        getattr(one, name).equal(getattr(other, name))
        for name in ("labelled_images", "labels", "unlabelled_images", "unlabelled_valid")
    )


def test_two_ranks_share_out_the_batch_of_one(make_recipe):
    alone = stream(make_recipe, engine={"micro_batch": 4})
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


def test_exact_mix_and_nothing_unlabelled_in_the_burn_in(make_recipe):
    recipe = {"data": {"unlabelled_per_labelled": 3}, "method": {"burn_in": 0.5}, "run": {"steps": 4}}
    sizes = [(len(b.labelled_images), len(b.unlabelled_images)) for b in batches(stream(make_recipe, **recipe), 0, 4)]
    assert sizes == [(2, 0), (2, 0), (2, 6), (2, 6)]


def test_labelled_draw(shapes):
    labelled = ShardStream(shapes, "labelled")
    draws = {tuple(draw_labelled(labelled, 3, seed)) for seed in range(6)}
    assert len(draws) > 1
    assert all(len(set(draw)) == 3 for draw in draws)
    assert draw_labelled(labelled, None, 0) == list(range(8))
    with pytest.raises(DataError, match=r"data\.labelled_count=9.*has 8"):
        draw_labelled(labelled, 9, 0)


def test_only_drawn_samples_are_ever_shown(make_recipe):
    few = stream(make_recipe, data={"labelled_count": 2, "scale_range": [1.0, 1.0]}, engine={"micro_batch": 4})
    assert {few.labelled_order[position] for position in range(100)} == set(few.drawn)


def test_more_ranks_than_shards(make_recipe):
    with pytest.raises(DataError, match="'labelled' has 8 shards for 9 ranks"):
        stream(make_recipe, 0, 9)


def test_class_pixels_count_the_drawn_samples_alone(make_recipe, shapes):
    few = stream(make_recipe, data={"labelled_count": 2})
    total = sum(
        torch.bincount(few._label(few.labelled[number]).flatten().long(), minlength=256)[:3] for number in few.drawn
    )
    assert few.class_pixels().equal(total)
    weights = class_weights(few.class_pixels())
    assert torch.isclose((weights * total / total.sum()).sum(), torch.tensor(1.0))


def test_label_value_of_no_class(make_recipe):
    narrow = TrainingStream(make_recipe(), 2, 0, 1, unlabelled=False)
    with pytest.raises(DataError, match=r"label value 2, but the model has 2 classes \(model\.num_classes\)"):
        list(batches(narrow, 0, 8))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_one_line_also_from_a_worker(make_recipe, shapes, tmp_path, workers):
    root = shutil.copytree(shapes, tmp_path / "bad")
    entry = ShardIndex.load(root).streams["labelled"].shards[0]
    _spoil(root, entry.file)
    bad = stream(make_recipe, data={"root": str(root), "workers": workers})
    with pytest.raises(DataError) as caught:
        list(batches(bad, 0, 8))
    assert str(caught.value).startswith(f"{entry.file}: labelled-0000: the image is")
    assert "\n" not in str(caught.value)


def _spoil(root, file):
    """Give the first sample a label map of another size, and the index the new bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(buffer, "PNG")
    with tarfile.open(root / file) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(root / file, "w") as tar:
        for name, data in members:
            data = buffer.getvalue() if name == "labelled-0000.png" else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = json.loads((root / "index.json").read_text())
    for shard in index["streams"]["labelled"]["shards"]:
        shard["bytes"] = (root / shard["file"]).stat().st_size
    (root / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_shows_each_sample_once(shapes, world_size):
    shown = [
        key for rank in range(world_size) for _, key, _, _ in evaluation_samples(str(shapes), "val", rank, world_size)
    ]
    assert sorted(shown) == [f"val-{number:04d}" for number in range(5)]
    with pytest.raises(DataError, match="no labels"):
        list(evaluation_samples(str(shapes), "unlabelled", 0, 1))
