"""A run from Python: what it leaves behind, that it continues exactly, and that it learns."""

import json
from pathlib import Path

import pytest
import torch

from maskmatch_scale.checkpoints.layout import CheckpointError
from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.runs.evaluate import evaluate_run
from maskmatch_scale.runs.model import open_run
from maskmatch_scale.train import train


def records(run: Path, kind: str = "train"):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_a_run_directory_has_what_the_contract_says(make_recipe):
    run = train(make_recipe(run={"steps": 4, "checkpoint_every": 2, "log_every": 3}, method={"burn_in": 0.25}))
    names = "step kind loss loss_x loss_u loss_m lr grad_norm coverage images_per_s data_wait_s step_s teacher_s ema_s"
    names += " tokens_per_s mfu gpu_allocated_gb gpu_reserved_gb gpu_peak_gb"
    steps = records(run)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(set(names.split()) <= record.keys() for record in steps)
    assert all(record[name] is None for record in steps for name in ("mfu", "gpu_peak_gb"))  # there is no GPU
    # SegFormer's finest level has tokens of 4 px; 2 images, 3 views of them after the burn-in, of which one to 0.3.
    tokens = [2 * 256, 2 * (2 * 256 + round(0.3 * 4) * 64)]
    assert [r["tokens_per_s"] * r["step_s"] for r in steps[:2]] == pytest.approx(tokens)
    assert steps[0]["loss_u"] is None
    assert steps[1]["loss_u"] > 0
    assert steps[1]["loss_m"] > 0
    assert steps[3]["loss"] == pytest.approx(sum(steps[3][part] for part in ("loss_x", "loss_u", "loss_m")))
    assert {(r["split"], r["weights"]) for r in records(run, "eval")} == {("dev", "ema"), ("dev", "student")}
    names = ["best", "latest", "step-00000002", "step-00000004"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == names
    assert (run / "checkpoints" / "latest").read_text() == "step-00000004"
    assert (run / "recipe.yaml").is_file()
    assert (run / "report.html").is_file()
    assert "rank 0 of 1" in (run / "log" / "rank-0.txt").read_text()


def test_continuing_is_exact(make_recipe, tmp_path):
    settings = {"steps": 6, "checkpoint_every": 3, "evaluate_every": 0}
    whole = train(make_recipe(run=settings | {"dir": str(tmp_path / "whole")}))
    part = tmp_path / "part"
    continued = train(
        make_recipe(run=settings | {"dir": str(part)}), resume=str(whole / "checkpoints" / "step-00000003")
    )
    assert [r["loss"] for r in records(continued)] == [r["loss"] for r in records(whole)][3:]
    for weights in ("ema", "student"):
        one, other = (open_run(run, weights)[1].state_dict() for run in (whole, continued))
        assert all(one[name].equal(other[name]) for name in one)
    assert train(make_recipe(run=settings | {"dir": str(part)}), resume="auto") == part


def test_an_older_run_is_moved_aside(make_recipe, tmp_path):
    recipe = make_recipe(run={"steps": 1})
    first = train(recipe)
    kept = (first / "metrics.jsonl").read_text()
    train(recipe)
    assert (tmp_path / "run.previous-1" / "metrics.jsonl").read_text() == kept


def test_same_recipe_same_losses(make_recipe, tmp_path):
    runs = [train(make_recipe(run={"dir": str(tmp_path / name)})) for name in "ab"]
    assert [r["loss"] for r in records(runs[0])] == [r["loss"] for r in records(runs[1])]


@pytest.mark.parametrize(("allowed", "checkpoint"), [(0, "step-00000002"), (2, "step-00000004")])
def test_a_loss_that_is_not_finite_stops_the_run(make_recipe, monkeypatch, allowed, checkpoint):
    from maskmatch_scale.method import maskmatch

    plain, calls = maskmatch.cross_entropy_sum, []

    def sometimes_nan(*arguments, **options):
        calls.append(1)
        # Supervised: one call a step.
        return plain(*arguments, **options) * (float("nan") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(maskmatch, "cross_entropy_sum", sometimes_nan)
    supervised = {"base": "supervised", "mask": {"keep": None}}
    run = {"steps": 9, "checkpoint_every": 2, "max_nonfinite_steps": allowed}
    recipe = make_recipe(method=supervised, run=run)
    with pytest.raises(TrainingStopped, match=f"step {3 + allowed}: the loss is not finite .*{checkpoint}"):
        train(recipe)
    folder = Path(recipe.run.dir)
    assert not (folder / "summary.json").exists()
    assert all(p.isfinite().all() for p in open_run(folder, "student")[1].state_dict().values())


@pytest.mark.parametrize("family", ["segformer", "vit"])
def test_overfits_four_labelled_crops(make_recipe, tmp_path, family):
    model = {
        "segformer": {
            "backbone": "transformers/segformer-b0",
            "backbone_options": {
                "depths": [1, 1, 1, 1],
                "hidden_sizes": [16, 24, 32, 48],
                "drop_path_rate": 0.0,
                "classifier_dropout_prob": 0.0,
            },
        },
        "vit": {
            "backbone": "timm/vit_tiny_patch16_224",
            "backbone_options": {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2},
        },
    }[family] | {"head": "pixel_shuffle"}
    recipe = make_recipe(
        data={"labelled_count": 4, "crop_px": [96, 128], "scale_range": [1.0, 1.0], "flip_probability": 0.0},
        model=model,
        method={"base": "supervised", "mask": {"keep": None}, "ema_decay": 0.9},
        optim={"lr": 4e-3 if family == "segformer" else 2e-3, "warmup_steps": 5, "clip_norm": 1.0},
        engine={"micro_batch": 4},
        run={"steps": 150 if family == "segformer" else 300, "evaluate_every": 0, "log_every": 50},
    )
    run = train(recipe)
    from maskmatch_scale.data.batches.training import TrainingBatches
    from maskmatch_scale.data.shards.index import ShardIndex
    from maskmatch_scale.evaluation.miou import ConfusionMatrix

    _, segmenter, _ = open_run(run, "ema")
    stream = TrainingBatches(recipe, 3, 0, 1, unlabelled=False)
    matrix = ConfusionMatrix(3, ShardIndex.load(recipe.data.root).ignore_index)
    batch = stream[0]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (segmenter.mean, segmenter.std))
    with torch.no_grad():
        matrix.update(segmenter((batch.labelled_images / 255 - mean) / std).argmax(1), batch.labels)
    assert matrix.miou() >= 0.9


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="not a run directory"):
            evaluate_run(folder, "val", ("ema",))
    assert not list(tmp_path.iterdir())


def test_evaluation_leaves_figures_and_pictures(make_recipe):
    run = train(make_recipe(run={"steps": 1}))
    (record,) = evaluate_run(run, "val", ("ema",))
    kept = json.loads((run / "evaluation" / "val-ema.json").read_text())
    assert kept["miou"] == record["miou"]
    assert kept["images"] == 5
    assert set(kept["iou"]) == {"ground", "square", "disc"}
    pictures = sorted(p.name for p in next((run / "pictures" / "val").glob("0*")).iterdir())
    assert pictures == ["image.png", "label.png", "prediction-ema.png", "prediction-visible.png", "visible.png"]


def test_a_step_that_is_left_out_leaves_batchnorm_as_it_was(make_recipe, monkeypatch):
    from maskmatch_scale.models import Segmenter

    plain, calls = Segmenter.encode, []

    def overflowing(self, *arguments, **options):
        features = plain(self, *arguments, **options)
        if self.training:
            calls.append(1)
            if len(calls) == 2:  # supervised: one call a step
                features[0] = features[0].clone()
                features[0][0, 0, 0, 0] = float("inf")
        return features

    monkeypatch.setattr(Segmenter, "encode", overflowing)
    supervised = {"base": "supervised", "mask": {"keep": None}}
    recipe = make_recipe(method=supervised, run={"steps": 3, "max_nonfinite_steps": 1, "evaluate_every": 0})
    run = train(recipe)
    assert [record.get("left_out") for record in records(run)] == [None, True, None]
    for weights in ("student", "ema"):
        state = open_run(run, weights)[1].state_dict()
        statistics = {name: value for name, value in state.items() if "running" in name}
        assert statistics
        assert all(value.isfinite().all() for value in statistics.values())
        counter = next(value for name, value in state.items() if name.endswith("num_batches_tracked"))
        assert counter == 2


def test_a_run_is_evaluated_in_its_own_precision(make_recipe):
    run = train(make_recipe(engine={"precision": "autocast-bf16"}, run={"steps": 1}))
    own = {record["weights"]: record["miou"] for record in records(run, "eval")}
    again = {record["weights"]: record["miou"] for record in evaluate_run(run, "dev", ("ema", "student"))}
    assert again == own
