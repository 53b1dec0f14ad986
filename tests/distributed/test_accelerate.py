"""Two CPU ranks under the real `accelerate launch` against one process of the other engine, same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskmatch_scale.runs.model import open_run
from maskmatch_scale.train import train
from tests.conftest import TINY_VIT, recipe_maker
from tests.distributed.launching import records

pytestmark = pytest.mark.distributed

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "head": "pixel_shuffle"}
BURN_IN = {"burn_in": 0.4}
CONFIGURATIONS = {
    "vit": {"model": VIT},
    # In burn-in the context decoder has no gradients, on either micro-batch.
    "vit-accumulation": {"model": VIT, "method": BURN_IN, "engine": {"accumulation": 2}},
    # The context decoder is used by the base's view alone.
    "vit-dropped": {"model": VIT, "method": {"mask": {"keep": None}, "strong_view": {"keep": 0.5}}},
    # DDP waits for the gradients of what is trained alone.
    "vit-freeze": {"model": VIT, "optim": {"freeze": 1}},
    # Collectives of BatchNorm within a backward that sends gradients.
    "segformer-synchronised": {"model": {"batchnorm": "synchronised"}, "method": BURN_IN},
}
ACCELERATE = {"library": "accelerate", "zero_stage": 0}
STEPS = 5


def recipe_of(make_recipe, name, folder):
    sections = {key: dict(value) for key, value in CONFIGURATIONS[name].items()}
    engine = {"micro_batch": 2} | ACCELERATE | sections.pop("engine", {})
    run = {"dir": str(folder / name), "steps": STEPS, "checkpoint_every": 3}
    optim = {"lr": 1e-3, "clip_norm": 0.5, "warmup_steps": 2} | sections.pop("optim", {})
    # Two lanes: the one process of the reference reads what two ranks read, in their order.
    return make_recipe(engine=engine, run=run, optim=optim, data={"lanes": 2}, **sections)


def launch(jobs, folder):
    """Train recipes on two ranks; returns the finished process."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
        str(Path(__file__).with_name("train_recipes.py")), str(file),
    ]  # fmt: skip
    # The launcher starts anew; what this process's own group left in the environment is not its.
    outside = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    environment = outside | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, shapes):
    """Run directories of every configuration on two ranks, of one continued run, and of one that diverges."""
    folder = tmp_path_factory.mktemp("accelerate")
    make = recipe_maker(shapes, folder)
    jobs = [{"recipe": recipe_of(make, name, folder).model_dump(mode="json")} for name in CONFIGURATIONS]
    again = recipe_of(make, "vit-accumulation", folder / "continued").model_dump(mode="json")
    jobs.append({"recipe": again, "resume": str(folder / "vit-accumulation" / "checkpoints" / "step-00000003")})
    # Weights beyond float32 after the first step: all others are left out.
    run = {"dir": str(folder / "left-out"), "steps": 4, "max_nonfinite_steps": 9, "evaluate_every": 0}
    diverging = make(model=VIT, engine=ACCELERATE, optim={"lr": 1e35, "warmup_steps": 0}, run=run)
    jobs.append({"recipe": diverging.model_dump(mode="json")})
    done = launch(jobs, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_two_ranks_equal_one(two_ranks, make_recipe, tmp_path, name):
    # The reference: DeepSpeed at ZeRO-1, one process, no accumulation.
    reference = recipe_of(make_recipe, name, tmp_path)
    images = 2 * reference.engine.micro_batch * reference.engine.accumulation
    plain = {"library": "deepspeed", "zero_stage": 1, "accumulation": 1, "micro_batch": images}
    alone = train(reference.model_copy(update={"engine": reference.engine.model_copy(update=plain)}))
    for one, two in zip(records(alone), records(two_ranks / name), strict=True):
        for key in ("loss", "loss_x", "loss_u", "loss_m", "coverage", "grad_norm"):
            # float32 sums in another order, over five steps of AdamW.
            assert two[key] == (one[key] and pytest.approx(one[key], rel=2e-4, abs=1e-6)), (one["step"], key)
    for one, two in zip(records(alone, "eval"), records(two_ranks / name, "eval"), strict=True):
        assert two["weights"] == one["weights"]
        assert two["pixel_accuracy"] == pytest.approx(one["pixel_accuracy"], abs=2e-3)
    for weights in ("ema", "student"):
        expected, found = (open_run(run, weights)[1].state_dict() for run in (alone, two_ranks / name))
        assert expected.keys() == found.keys()
        apart = torch.cat([(expected[key].float() - found[key].float()).abs().flatten() for key in expected])
        # A tenth of one step of AdamW. It divides by the gradient's own size, so single weights whose gradient is
        # little more than rounding may go another way.
        assert (apart > 1e-4).float().mean() < 1e-2, weights
        assert apart.max() < 1e-3, weights


def test_two_ranks_continue_exactly(two_ranks):
    whole, continued = (records(folder / "vit-accumulation") for folder in (two_ranks, two_ranks / "continued"))
    assert [r["loss"] for r in continued] == [r["loss"] for r in whole][3:]


def test_steps_left_out_stall_nobody(two_ranks):
    assert [r.get("left_out", False) for r in records(two_ranks / "left-out")] == [False, True, True, True]
