"""DeepSpeed alone, in this process: what of it the two-rank matrix leaves out."""

import json
from pathlib import Path

import pytest

from maskmatch_scale.train import train
from tests.conftest import TINY_VIT

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT}


def records(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # the compiler takes most of a minute
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_blocks_train_as_eager_ones(make_recipe, tmp_path, stage):
    losses = []
    for compiled in (False, True):
        engine = {"zero_stage": stage, "compile": compiled}
        run = {"dir": str(tmp_path / str(compiled)), "steps": 4, "evaluate_every": 0}
        folder = train(make_recipe(model=VIT, engine=engine, run=run, optim={"lr": 1e-3}))
        losses.append([r["loss"] for r in records(folder) if r["kind"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_record_says_what_the_teacher_costs(make_recipe):
    run = train(make_recipe(model=VIT, run={"steps": 2}))
    for record in records(run)[:2]:
        assert 0 < record["ema_s"] < record["step_s"]
        assert 0 < record["teacher_s"] < record["step_s"]


def test_the_log_says_which_precision_and_learning_rate_and_why(make_recipe):
    engine = {"precision": "auto", "micro_batch": 4}
    run = train(make_recipe(model=VIT, engine=engine, optim={"lr": 1e-3, "lr_reference_batch": 16}, run={"steps": 1}))
    log = (run / "log" / "rank-0.txt").read_text()
    assert "fp32 (engine.precision=auto, and there is no GPU)" in log
    assert "peak learning rate 0.00025: optim.lr=0.001, scaled from 16 to 4 labelled images a step" in log
    assert records(run)[0]["lr"] == pytest.approx(2.5e-4)
    assert "precision: fp32" in (run / "recipe.yaml").read_text()
