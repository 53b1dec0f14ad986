"""The second engine, alone: what a recipe means under accelerate is what it means under DeepSpeed."""

import json
import os
import subprocess
import sys

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from maskmatch_scale.engine import setup
from maskmatch_scale.engine.ddp import DdpEngine, accelerator_of
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.errors import UserError
from maskmatch_scale.runs.model import open_run
from maskmatch_scale.train import train
from tests.conftest import TINY_VIT
from tests.engine.state import Stored

ACCELERATE = {"library": "accelerate", "zero_stage": 0, "precision": "fp32"}
MODELS = {
    "vit": {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "head": "pixel_shuffle"},
    "segformer": {},
}
LOSSES = ("loss", "loss_x", "loss_u", "loss_m")


def records(run):
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "train"]


SEED = 1
"""With seed 0 one weight, whose gradient is near rounding, goes 2.06e-5 apart: the bound stays, the draw is another."""


def run_of(make_recipe, folder, **sections):
    """Train five steps of it, the first two burn-in; weight decay high enough to be seen."""
    run = {"dir": str(folder), "steps": 5, "checkpoint_every": 3, "evaluate_every": 0, "seed": SEED}
    optim = {"lr": 1e-3, "clip_norm": 0.5, "warmup_steps": 2, "weight_decay": 0.5}
    method = {"burn_in": 0.4}
    return train(make_recipe(run=run, **{"optim": optim, "method": method} | sections))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("family", MODELS)
def test_same_run_as_under_deepspeed(make_recipe, tmp_path, family, stage):
    model = {"model": MODELS[family]}
    ours = run_of(make_recipe, tmp_path / "ours", engine=ACCELERATE, **model)
    theirs = run_of(make_recipe, tmp_path / "theirs", engine={"zero_stage": stage}, **model)
    for one, other in zip(records(ours), records(theirs), strict=True):
        assert one["lr"] == other["lr"]
        for key, rel in (*dict.fromkeys(LOSSES, 1e-5).items(), ("grad_norm", 5e-4)):
            assert one[key] == (other[key] and pytest.approx(other[key], rel=rel)), (key, one["step"])
    for weights in ("ema", "student"):
        expected, found = (open_run(run, weights)[1].state_dict() for run in (theirs, ours))
        for key in expected:
            # A bias before BatchNorm has no gradient but rounding, of which Adam makes whole steps.
            if not key.endswith("proj.bias") or family == "vit":
                assert (expected[key].float() - found[key].float()).abs().max() < 2e-5, (weights, key)


def test_accumulated_micro_batches_equal_one(make_recipe, tmp_path):
    model = {"model": MODELS["vit"]}
    engine = {"micro_batch": 2, "accumulation": 2}
    parts = run_of(make_recipe, tmp_path / "parts", engine=ACCELERATE | engine, **model)
    whole = run_of(make_recipe, tmp_path / "whole", engine=ACCELERATE | {"micro_batch": 4}, **model)
    for one, other in zip(records(parts), records(whole), strict=True):
        for key in (*LOSSES, "grad_norm"):
            assert one[key] == (other[key] and pytest.approx(other[key], rel=2e-4)), (key, one["step"])


def test_continuing_is_exact_in_either_precision(make_recipe, tmp_path):
    # One process, two precisions: accelerate's own mixed precision would be the first run's for both.
    for precision in ("autocast-bf16", "fp32"):
        engine = ACCELERATE | {"precision": precision}
        whole = run_of(make_recipe, tmp_path / precision, engine=engine)
        run = {"dir": str(tmp_path / f"{precision}-continued"), "steps": 5, "evaluate_every": 0, "seed": SEED}
        recipe = make_recipe(
            engine=engine,
            run=run,
            optim={"lr": 1e-3, "clip_norm": 0.5, "warmup_steps": 2, "weight_decay": 0.5},
            method={"burn_in": 0.4},
        )
        continued = train(recipe, resume=str(whole / "checkpoints" / "step-00000003"))
        assert [r["loss"] for r in records(continued)] == [r["loss"] for r in records(whole)][3:]
        for weights in ("ema", "student"):
            one, other = (open_run(run, weights)[1].state_dict() for run in (whole, continued))
            assert all(one[name].equal(other[name]) and one[name].dtype != torch.bfloat16 for name in one)
    narrow, wide = (records(tmp_path / precision)[0] for precision in ("autocast-bf16", "fp32"))
    assert narrow["loss"] == pytest.approx(wide["loss"], rel=2e-2)
    assert narrow["loss"] != wide["loss"]


def test_no_deepspeed(make_recipe):
    """Neither ours, nor accelerate, transformers or timm import it."""
    recipe = make_recipe(engine=ACCELERATE, run={"steps": 1}).model_dump(mode="json")
    code = (
        "import json, sys\n"
        "from maskmatch_scale.recipe import parse_recipe; from maskmatch_scale.train import train\n"
        "train(parse_recipe(json.loads(sys.argv[1])))\n"
        "assert 'deepspeed' not in sys.modules"
    )
    # Alone: without what this process's own group has left in the environment.
    alone = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, "-c", code, json.dumps(recipe)]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


class Toy(nn.Module):
    """Student and module in one; its context is used when asked for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head, self.context = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, inputs, context, factor=1.0):
        features = self.backbone(inputs).relu()
        logits = self.head(features) + (self.context(features) if context else 0)
        loss = logits.float().square().mean() * factor
        return loss, loss.detach()[None]


@pytest.fixture
def fresh_accelerate():
    """No Accelerator in this process, before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def ddp_of_one(fresh_accelerate, make_recipe, monkeypatch):
    """DDP around the only rank: what several ranks run, in one process."""
    setup.start(Place.from_environment(), make_recipe(engine=ACCELERATE).engine)
    monkeypatch.setenv("LOCAL_RANK", "0")
    accelerate.Accelerator(cpu=True)


def toy_engine(make_recipe, **sections):
    recipe = make_recipe(**{"optim": {"lr": 1e-2}, "method": {"burn_in": 0.4}} | sections)
    # Past the recipe's and the run's checks: fp16 is for GPUs, and its arithmetic on CPU for tests only.
    runtime = setup.start(Place.from_environment(), recipe.engine)
    module = Toy()
    return DdpEngine(module, module, recipe, runtime), module


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_equals_a_loop_in_plain_torch(ddp_of_one, make_recipe, clip_norm):
    optim = {"lr": 1e-2, "clip_norm": clip_norm, "warmup_steps": 2, "weight_decay": 0.1}
    engine, module = toy_engine(make_recipe, engine=ACCELERATE | {"accumulation": 2}, optim=optim)
    assert isinstance(engine._module, nn.parallel.DistributedDataParallel)
    plain = Toy()
    groups = [
        {"params": [p for p in plain.parameters() if (p.dim() > 1) == decayed], "weight_decay": 0.1 * decayed}
        for decayed in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, betas=engine.recipe.optim.betas)
    inputs = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    for number in range(3):
        for last, micro in enumerate(inputs[number]):
            engine.accumulate(micro, number != 1, last=bool(last))
            plain(micro, number != 1)[0].backward()
        engine.step(number)
        for p in plain.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = nn.utils.clip_grad_norm_(plain.parameters(), clip_norm or float("inf"))
        for group in adamw.param_groups:
            group["lr"] = engine.lr(number)
        adamw.step()
        adamw.zero_grad()
        assert isinstance(engine.grad_norm, torch.Tensor)
        torch.testing.assert_close(engine.grad_norm, norm)
        assert not engine.skipped
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_left_out_leaves_nothing_behind(ddp_of_one, make_recipe):
    weights = []
    for also_left_out in (False, True):
        engine, module = toy_engine(make_recipe, engine=ACCELERATE, run={"max_nonfinite_steps": 3})
        for number in range(3):
            if also_left_out:
                engine.accumulate(torch.ones(2, 4), True, float("nan"), last=True)
                engine.step(number)
                assert engine.skipped
            engine.accumulate(torch.full((2, 4), float(number)), True, last=True)
            engine.step(number)
            assert not engine.skipped
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert weights[0].equal(weights[1])


def test_an_overflow_in_fp16_skips_the_step(make_recipe):
    engine, module = toy_engine(make_recipe, engine=ACCELERATE | {"precision": "fp16"})
    before = [p.detach().clone() for p in module.parameters()]
    scale = engine._accelerator.scaler.get_scale()
    for number, (factor, skipped) in enumerate([(float("inf"), True), (1e-4, False)]):
        engine.accumulate(torch.ones(2, 4), True, factor, last=True)
        engine.step(number)
        assert engine.skipped is skipped
        unchanged = all(one.equal(other) for one, other in zip(before, module.parameters(), strict=True))
        assert unchanged is skipped
    assert engine._accelerator.scaler.get_scale() < scale
    plain = Toy()
    plain.load_state_dict(dict(zip(plain.state_dict(), before)))
    plain(torch.ones(2, 4), True, 1e-4)[0].backward()
    norm = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    assert float(engine.grad_norm) == pytest.approx(float(norm), rel=1e-2)  # of gradients without their scale

    other, _ = toy_engine(make_recipe, engine=ACCELERATE | {"precision": "fp16"})
    other.restore(Stored(engine.pieces()), engine.progress())
    assert other._accelerator.scaler.get_scale() == engine._accelerator.scaler.get_scale()


def test_the_order_of_calls_is_held(make_recipe):
    engine, _ = toy_engine(make_recipe, engine=ACCELERATE)
    engine.accumulate(torch.ones(2, 4), True, last=False)
    with pytest.raises(RuntimeError, match="a step before its last gradients"):
        engine.step(0)
    engine.accumulate(torch.ones(2, 4), True, last=True)
    with pytest.raises(RuntimeError, match="gradients after the last"):
        engine.accumulate(torch.ones(2, 4), True, last=True)


def test_other_ranks_than_the_launchers_are_refused(fresh_accelerate):
    # What `Accelerator()` alone makes of two ranks on CPU: two jobs of one rank each.
    accelerate.Accelerator(cpu=True)
    for place in (Place(0, 0, 2, 2), Place(1, 1, 2, 2)):
        runtime = Runtime(place, torch.device("cpu"), 1)
        with pytest.raises(UserError, match=rf"rank 0 of 1 .* rank {place.rank} of 2 .*launch/accelerate\.sh"):
            accelerator_of(runtime)


def test_an_accelerator_of_another_kind_in_this_process_is_refused(fresh_accelerate):
    accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(UserError, match=r"already been initialized .*not make an Accelerator of your own"):
        accelerator_of(Runtime(Place(0, 0, 1, 1), torch.device("cpu"), 1))


def test_another_engine_in_accelerates_configuration_is_refused(fresh_accelerate, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="asks for FSDP"):
        accelerator_of(Runtime(Place(0, 0, 1, 1), torch.device("cpu"), 1))


def test_accelerates_environment_decides_nothing(fresh_accelerate, monkeypatch):
    for name, value in {
        "MIXED_PRECISION": "bf16",
        "GRADIENT_ACCUMULATION_STEPS": "4",
        "DYNAMO_BACKEND": "EAGER",
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    threads = torch.get_num_threads()
    accelerator = accelerator_of(Runtime(Place(0, 0, 1, 1), torch.device("cpu"), threads))
    assert accelerator.mixed_precision == "no"
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert torch.get_num_threads() == threads
    assert "LOCAL_WORLD_SIZE" not in os.environ


def test_a_launcher_that_names_no_rank_is_refused(make_recipe, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="RANKS=2 launch/accelerate"):
        setup.start(Place.from_environment(), make_recipe(engine=ACCELERATE).engine)
