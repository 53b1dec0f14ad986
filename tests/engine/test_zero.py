"""DeepSpeed alone, in this process: what of it the two-rank matrix leaves out."""

import json
from pathlib import Path

import pytest
import torch

from maskmatch_scale.runs.model import open_run
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback
from tests.conftest import TINY_VIT, needs_compiler

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT}


def records(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # the compiler takes most of a minute
@needs_compiler
@pytest.mark.parametrize("model", [VIT, {}], ids=["vit", "segformer"])
def test_compiled_blocks_train_as_eager_ones(make_recipe, tmp_path, model):
    """At ZeRO-0; ZeRO-1 and 2 on two ranks: tests/distributed/test_compiled.py."""
    losses = []
    for compiled in (False, True):
        engine = {"zero_stage": 0, "compile": compiled}
        run = {"dir": str(tmp_path / str(compiled)), "steps": 4, "evaluate_every": 0}
        sections = {"model": model} if model else {}
        folder = train(make_recipe(engine=engine, run=run, optim={"lr": 1e-3}, **sections))
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


@pytest.mark.parametrize("engine", [*({"zero_stage": s} for s in range(4)), {"zero_stage": 0, "library": "accelerate"}])
def test_a_resumed_run_does_what_its_recipe_says_now(make_recipe, tmp_path, engine):
    plain = {"lr": 1e-3, "weight_decay": 0.01, "betas": [0.9, 0.999], "clip_norm": None}
    run = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 0}
    first = train(make_recipe(model=VIT, engine=engine, optim=plain, run=run | {"dir": str(tmp_path / "first")}))
    seen = []
    changed = plain | {"weight_decay": 0.3, "betas": [0.5, 0.9], "clip_norm": 1e-3}
    recipe = make_recipe(model=VIT, engine=engine, optim=changed, run=run | {"dir": str(tmp_path / "second")})

    class Look(Callback):
        def started(self):
            seen.append(self.run.engine)

    train(recipe, resume=str(first / "checkpoints" / "step-00000002"), callbacks=[Look])
    optimizer = seen[0]._engine.optimizer if "library" not in engine else seen[0]._optimizer
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.5, 0.9)}
    assert getattr(optimizer, "clip_grad", 1e-3) == 1e-3
    one, other = (open_run(tmp_path / name, "student")[1].state_dict() for name in ("first", "second"))
    assert not all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize(
    "engine",
    [
        *({"zero_stage": stage} for stage in range(4)),
        *({"zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)),
        *({"zero_stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)),
        *({"zero_stage": stage, "offload_optimizer": True, "precision": "bf16"} for stage in (1, 2, 3)),
        {"zero_stage": 0, "library": "accelerate"},
    ],
    ids=lambda engine: "-".join(map(str, engine.values())),
)
def test_of_a_step_that_is_left_out_nothing_is_left(make_recipe, tmp_path, monkeypatch, engine):
    from maskmatch_scale.method import maskmatch

    plain, calls = maskmatch.cross_entropy_sum, []

    def once_nan(*arguments, **options):
        calls.append(1)
        return plain(*arguments, **options) * (float("nan") if len(calls) == 4 else 1.0)  # the second step's second

    monkeypatch.setattr(maskmatch, "cross_entropy_sum", once_nan)
    supervised = {"base": "supervised", "mask": {"keep": None}}
    run = {"dir": str(tmp_path / "run"), "steps": 4, "max_nonfinite_steps": 1, "evaluate_every": 0}
    folder = train(make_recipe(model=VIT, engine=engine | {"accumulation": 2}, method=supervised, run=run))
    steps = [record for record in records(folder) if record["kind"] == "train"]
    assert [record.get("left_out", False) for record in steps] == [False, True, False, False]
    for weights in ("student", "ema"):
        assert all(value.isfinite().all() for value in open_run(folder, weights)[1].state_dict().values())
    assert all(torch.tensor(record["grad_norm"]).isfinite() for record in steps if not record.get("left_out"))
