"""Whole runs and their data: samples that are skipped, runs without labels, streams that continue."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from maskmatch_scale.checkpoints.finding import find
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.errors import TrainingStopped, UserError
from maskmatch_scale.export.write import export_run
from maskmatch_scale.recipe import RecipeError
from maskmatch_scale.runs.model import open_run
from maskmatch_scale.train import train
from tests.checkpoints.made_up import write
from tests.conftest import ShapesSource, rewrite_shard, write_shards


def train_records(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "train"]


def skipped_samples(run):
    files = sorted((run / "skipped").glob("rank-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def spoilt(shapes, tmp_path):
    """Two of the 24 unlabelled samples cannot be decoded, one has no bytes at all."""
    root = shutil.copytree(shapes, tmp_path / "spoilt")
    for number, data in {3: b"RIFF, but no image", 9: b"", 17: b"\xff\xd8\xff"}.items():
        shards = ShardIndex.load(root).streams["unlabelled"].shards
        shard = int(shards.starts.searchsorted(number, side="right")) - 1
        rewrite_shard(root, shards.file(shard), {f"unlabelled-{number:04d}.webp": data})
    return root


def test_skipped_samples_are_counted_by_reason_and_listed(make_recipe, spoilt):
    run = train(make_recipe(data={"root": str(spoilt)}, run={"steps": 12, "evaluate_every": 0}))
    counted = Counter()
    for record in train_records(run):
        counted.update(record.get("skipped", {}))
    listed = skipped_samples(run)
    assert counted == Counter(entry["reason"] for entry in listed)
    assert {(e["key"], e["reason"]) for e in listed} == {
        ("unlabelled-0003", "not_an_image"),
        ("unlabelled-0009", "empty"),
        ("unlabelled-0017", "not_an_image"),
    }
    assert all(entry["source"] == "unlabelled" and entry["message"] and entry["shard"] for entry in listed)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["images_read"], summary["images_skipped"]) == (48, len(listed))


def test_what_was_skipped_is_remembered_when_a_run_continues(make_recipe, spoilt):
    recipe = make_recipe(data={"root": str(spoilt)}, run={"steps": 12, "evaluate_every": 0, "checkpoint_every": 6})
    run = train(recipe)
    whole = json.loads((run / "summary.json").read_text())
    losses = [record["loss"] for record in train_records(run)]
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "checkpoints" / "latest").write_text("step-00000006")
    train(recipe, "auto")
    again = json.loads((run / "summary.json").read_text())
    assert {k: again[k] for k in ("images_read", "images_skipped")} == {
        k: whole[k] for k in ("images_read", "images_skipped")
    }
    assert [record["loss"] for record in train_records(run)][12:] == losses[6:]


def test_too_many_bad_samples_stop_the_run(make_recipe, spoilt):
    recipe = make_recipe(data={"root": str(spoilt), "max_bad_share": 0.0}, run={"steps": 12, "evaluate_every": 0})
    with pytest.raises(TrainingStopped, match=r"samples were skipped.*data\.max_bad_share=0\.0.*skipped lists them"):
        train(recipe)
    # It goes on from where it stopped when the limit is raised.
    stopped = find(Path(recipe.run.dir)).folder
    assert len(skipped_samples(Path(recipe.run.dir))) == 1
    data = recipe.data.model_copy(update={"max_bad_share": 0.5})
    run = train(recipe.model_copy(update={"data": data}), "auto")
    assert [record["step"] for record in train_records(run)] == list(range(1, 13))
    assert int(stopped.name.removeprefix("step-")) < 12


def test_bad_unlabelled_samples_may_be_errors(make_recipe, spoilt):
    recipe = make_recipe(data={"root": str(spoilt), "bad_unlabelled": "fail"}, run={"steps": 12})
    with pytest.raises(UserError, match=r"unlabelled-00\d\d"):
        train(recipe)


@pytest.fixture
def never_labelled(tmp_path):
    """Shards of a folder that knows no classes."""
    source = ShapesSource({"unlabelled": 11}, name="archive", classes=(), palette=())
    write_shards(source, tmp_path / "archive", workers=1, progress=False)
    return tmp_path / "archive"


@pytest.mark.parametrize("start", ["run", "checkpoint", "export"])
def test_without_labels_from_a_trained_start_and_on_to_the_next_run(make_recipe, never_labelled, tmp_path, start):
    first = train(make_recipe(run={"steps": 2, "evaluate_every": 0, "dir": str(tmp_path / "first")}))
    started_from = {"run": first, "checkpoint": first / "checkpoints" / "step-00000002", "export": tmp_path / "export"}
    if start == "export":
        export_run(first, tmp_path / "export")
    model = dict(make_recipe().model) | {"pretrained": str(started_from[start])}
    run = train(
        make_recipe(
            data={"root": str(never_labelled), "labelled_count": 0},
            model=model,
            method={"threshold": 0.0, "unlabelled_weight": 0.5, "mask": {"weight": 2.0}},
            run={"steps": 3, "dir": str(tmp_path / "second")},
        )
    )
    for record in train_records(run):
        assert record["loss_x"] is None
        assert record["coverage"] == 1
        assert record["loss"] == pytest.approx(0.5 * record["loss_u"] + 2.0 * record["loss_m"], rel=1e-6)
    data = json.loads((run / "data.json").read_text())
    assert data["classes"] == ["ground", "square", "disc"]
    assert data["samples"] == {"labelled": 0, "unlabelled": 11}
    export_run(run, tmp_path / "exported")
    assert "0 labelled images and 11 unlabelled ones" in (tmp_path / "exported" / "README.md").read_text()
    # Its teacher started as the first run's, and starts the next labelled run.
    _, teacher, _ = open_run(run, "ema")
    last = train(
        make_recipe(
            model=model | {"pretrained": str(run)},
            run={"steps": 1, "dir": str(tmp_path / "third")},
            optim={"lr": 1e-12},
        )
    )
    _, student, _ = open_run(last, "student")
    for (name, value), other in zip(teacher.named_parameters(), student.parameters(), strict=True):
        assert value.sub(other).abs().max() < 1e-6, name


def test_without_labels_and_without_a_trained_start(make_recipe, never_labelled, tmp_path):
    data = {"root": str(never_labelled), "labelled_count": 0}
    with pytest.raises(RecipeError, match="the teacher must be a trained segmenter from the start"):
        make_recipe(data=data)
    with pytest.raises(RecipeError, match=r"method\.burn_in=0\.1: .*labelled loss alone"):
        make_recipe(data=data, model=dict(make_recipe().model) | {"pretrained": "x"}, method={"burn_in": 0.1})
    with pytest.raises(RecipeError, match="nothing to learn from"):
        make_recipe(
            data=data,
            model=dict(make_recipe().model) | {"pretrained": "x"},
            method={"base": "supervised", "mask": {"keep": None}},
        )
    backbone = tmp_path / "backbone.pth"
    import torch

    torch.save({"patch_embed.weight": torch.zeros(1)}, backbone)
    model = dict(make_recipe().model) | {"pretrained": str(backbone), "num_classes": 3}
    with pytest.raises(UserError, match="with its head"):
        train(make_recipe(data=data, model=model))


def test_labelled_runs_need_labels_and_class_names(make_recipe, never_labelled, shapes):
    with pytest.raises(UserError, match=r"no stream 'labelled' .* data\.labelled_count=0 model\.pretrained=RUN"):
        train(make_recipe(data={"root": str(never_labelled)}))
    with pytest.raises(UserError, match="its index names no classes"):
        train(make_recipe(data={"root": str(never_labelled), "labelled": [{"root": str(shapes)}]}))


@pytest.mark.parametrize(
    ("data", "run", "method", "steps"),
    [
        ({}, {"epochs": 1}, {}, 12),
        ({}, {"epochs": 0.5}, {"burn_in": 0.25}, 8),
        ({"unlabelled_per_labelled": 5}, {"epochs": 1}, {}, 3),
        ({"unlabelled_per_labelled": 5}, {"epochs": 1, "last_batch": "drop"}, {}, 2),
        ({"labelled_count": 5}, {"epochs": 1}, {"base": "supervised", "mask": {"keep": None}}, 3),
        ({"labelled_count": 5}, {"epochs": 1, "last_batch": "drop"}, {"base": "supervised", "mask": {"keep": None}}, 2),
    ],
)
def test_finite_passes(make_recipe, data, run, method, steps):
    run = {"steps": 0, "evaluate_every": 0} | run
    folder = train(make_recipe(data=dict(make_recipe().data) | data, run=dict(make_recipe().run) | run, method=method))
    assert len(train_records(folder)) == steps


def test_finite_passes_of_nothing(make_recipe):
    run = dict(make_recipe().run) | {"steps": 0, "epochs": 1.0, "last_batch": "drop"}
    with pytest.raises(RecipeError, match=r"run\.last_batch=drop: 24 samples fill no step of 32 images"):
        train(make_recipe(run=run, engine={"micro_batch": 32}))
    with pytest.raises(RecipeError, match=r"run\.steps=3 and run\.epochs=1\.0: a run needs one of them"):
        make_recipe(run=run | {"steps": 3})
    with pytest.raises(RecipeError, match=r"run\.steps=0 and run\.epochs=null"):
        make_recipe(run=run | {"epochs": None})


def test_without_labels_the_head_must_be_the_trained_one(make_recipe, never_labelled, shapes, tmp_path):
    """A head that does not fit would stay random; one with other classes would be called by wrong names."""
    first = train(make_recipe(run={"steps": 1, "dir": str(tmp_path / "first")}))
    model = dict(make_recipe().model) | {"pretrained": str(first)}
    data = {"root": str(never_labelled), "labelled_count": 0}
    with pytest.raises(UserError, match=r"its head does not fit \(head\."):
        train(make_recipe(data=data, model=model | {"num_classes": 5}))
    with pytest.raises(UserError, match=r"its head does not fit \(head\."):
        train(make_recipe(data=data, model=model | {"head": "linear"}))
    root = shutil.copytree(shapes, tmp_path / "renamed")
    index = json.loads((root / "index.json").read_text())
    index["classes"] = ["ground", "disc", "square"]
    (root / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"trained on classes ground, square, disc, the index of .* has ground, disc"):
        train(make_recipe(data={"root": str(root), "labelled_count": 0}, model=model))


@pytest.mark.parametrize("burn_in", [0.0, 0.37, 0.5, 0.9])
@pytest.mark.parametrize(("samples", "images"), [(94, 10), (96, 10), (100, 10), (7, 3)])
@pytest.mark.parametrize("last", ["drop", "pad"])
def test_an_epoch_behind_a_burn_in_is_an_epoch(make_recipe, burn_in, samples, images, last):
    run = dict(make_recipe().run) | {"steps": 0, "epochs": 1.0, "last_batch": last}
    counted = make_recipe(run=run, method={"burn_in": burn_in}).with_steps(samples, images, labelled=False)
    after = counted.run.steps - counted.burn_in_steps
    assert after == (samples // images if last == "drop" else -(-samples // images))


def test_a_lost_shard_counts_its_own_samples_alone(make_recipe, shapes, tmp_path):
    """Also where it is larger than the window, so that no sample of the window can stand in."""
    root = shutil.copytree(shapes, tmp_path / "lost")
    lost = ShardIndex.load(root).streams["unlabelled"].shards[3]
    (root / lost.file).unlink()
    data = {"root": str(root), "shuffle_window": 1}
    run = train(make_recipe(data=data, run={"steps": 12, "evaluate_every": 0}))
    listed = skipped_samples(run)
    assert [(entry["shard"], entry["reason"]) for entry in listed] == [(lost.file, "shard_unreadable")] * lost.samples


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("recipe", "the recipe of rank 1 differs from that of rank 0"),
        ("checkpoint", "the checkpoint to continue from"),
        ("shards", "the list of shards, or the place in it"),
        ("weights", "the way to build the model .* of rank 1 differs"),
    ],
)
def test_ranks_that_would_train_different_runs(make_recipe, shapes, tmp_path, changed, message):
    """Each sees its own files: what two ranks know is put together here as an all-reduce would."""
    import torch

    from maskmatch_scale.data.batches.training import TrainingBatches
    from maskmatch_scale.training import preflight

    def known(rank, recipe, checkpoint, deferred=False):
        class Runtime:
            world_size, device = 2, torch.device("cpu")
            sent = None

            def sum_over_ranks(self, tensor):
                self.sent = tensor.clone()
                return tensor

        runtime = Runtime()
        runtime.rank = rank
        stream = TrainingBatches(recipe, 3, rank, 2, unlabelled=True)
        with pytest.raises(UserError):  # the other rank's row is still empty
            preflight.check_agreement(runtime, recipe, stream, checkpoint, deferred=deferred)
        return runtime, stream

    root = shutil.copytree(shapes, tmp_path / "other")
    index = json.loads((root / "index.json").read_text())
    index["streams"]["unlabelled"]["shards"].reverse()
    (root / "index.json").write_text(json.dumps(index))
    recipe = make_recipe(run={"seed": 5})
    others = {
        "recipe": (make_recipe(run={"seed": 6}), None),
        "checkpoint": (recipe, find(write(tmp_path, 4).folder)),
        "shards": (make_recipe(run={"seed": 5}, data={"root": str(root)}), None),
        "weights": (recipe, None, True),
    }
    one, stream = known(0, recipe, None)
    other, _ = known(1, *others[changed])
    if changed == "shards":  # of the same recipe: the folder has the same name on both machines
        other.sent[1, 0] = one.sent[0, 0]
    one.sum_over_ranks = lambda tensor: tensor + other.sent
    with pytest.raises(UserError, match=message) as caught:
        preflight.check_agreement(one, recipe, stream, None, deferred=False)
    assert caught.value.on_all_ranks


def test_a_missing_dev_shard_is_found_at_the_start(make_recipe, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "cut")
    lost = ShardIndex.load(root).streams["dev"].shards[0].file
    (root / lost).unlink()
    recipe = make_recipe(data={"root": str(root)})
    with pytest.raises(UserError, match=lost):
        train(recipe)
    assert not Path(recipe.run.dir).exists()
