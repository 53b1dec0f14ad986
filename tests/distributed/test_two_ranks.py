"""Two CPU ranks under the real deepspeed launcher against one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskmatch_scale.engine.setup import _free_port
from maskmatch_scale.train import train
from maskmatch_scale.trained import open_run
from tests.conftest import TINY_VIT

pytestmark = pytest.mark.distributed

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "head": "pixel_shuffle"}
FROZEN = {"batchnorm": "frozen"}
CONFIGURATIONS = {
    # Frozen BatchNorm: per-rank statistics are the one thing in which two ranks differ from one by design.
    "segformer": {"model": FROZEN},
    "vit": {"model": VIT},
    "vit-scales": {"model": VIT, "method": {"scales": [0.5, 1.0, 1.5], "mask": {"view": "strong", "pixels": "masked"}}},
    "vit-accumulation": {"model": VIT, "engine": {"accumulation": 2}},
    "zero-0": {"model": VIT, "engine": {"zero_stage": 0}},
    "zero-2": {"model": VIT, "engine": {"zero_stage": 2}},
    "zero-3": {"model": VIT, "engine": {"zero_stage": 3}},
    "zero-3-segformer": {"model": FROZEN, "engine": {"zero_stage": 3}},
    # Blocks run again in backward, where ZeRO-3 must gather their weights again; the reference keeps activations.
    "zero-3-checkpointing": {"model": VIT, "engine": {"zero_stage": 3, "activation_checkpointing": True}},
    "zero-3-segformer-checkpointing": {
        "model": FROZEN,
        "engine": {"zero_stage": 3, "activation_checkpointing": True},
    },
}
STEPS = 5


def recipe_of(make_recipe, name, folder):
    sections = {key: dict(value) for key, value in CONFIGURATIONS[name].items()}
    # Two images of each kind: CutMix's pairs stay on one rank.
    engine = {"micro_batch": 2} | sections.pop("engine", {})
    run = {"dir": str(folder / name), "steps": STEPS, "checkpoint_every": 3}
    return make_recipe(engine=engine, run=run, optim={"lr": 1e-3, "clip_norm": 0.5, "warmup_steps": 2}, **sections)


def launch(jobs, folder):
    """Train recipes on two ranks; returns the finished process."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    bin_folder = Path(sys.executable).parent
    command = [
        str(bin_folder / "deepspeed"), "--num_accelerators", "2", "--no_local_rank", "--master_port", str(_free_port()),
        str(Path(__file__).with_name("train_recipes.py")), str(file),
    ]  # fmt: skip
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory, shapes):
    """Run directories of every configuration on two ranks, and of one that continues from its third step."""
    from tests.conftest import recipe_maker

    folder = tmp_path_factory.mktemp("two-ranks")
    make = recipe_maker(shapes, folder)
    jobs = [{"recipe": recipe_of(make, name, folder).model_dump(mode="json")} for name in CONFIGURATIONS]
    for name in ("vit", "zero-3"):
        again = recipe_of(make, name, folder / "continued").model_dump(mode="json")
        jobs.append({"recipe": again, "resume": str(folder / name / "checkpoints" / "step-00000003")})
    done = launch(jobs, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def records(run, kind="train"):
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_two_ranks_equal_one(two_ranks, make_recipe, tmp_path, name):
    # The reference: one process, no accumulation, ZeRO-1, the same global batch.
    reference = recipe_of(make_recipe, name, tmp_path)
    images = 2 * reference.engine.micro_batch * reference.engine.accumulation
    plain = {"zero_stage": 1, "accumulation": 1, "micro_batch": images, "activation_checkpointing": False}
    engine = reference.engine.model_copy(update=plain)
    alone = train(reference.model_copy(update={"engine": engine}))
    for one, two in zip(records(alone), records(two_ranks / name), strict=True):
        for key in ("loss", "loss_x", "loss_u", "loss_m", "coverage", "grad_norm"):
            # float32 sums in another order, over five steps of AdamW.
            assert two[key] == pytest.approx(one[key], rel=2e-4, abs=1e-6), (name, one["step"], key)
    # The teacher's forward, not its shards: what it predicts on `dev` is the same.
    for one, two in zip(records(alone, "eval"), records(two_ranks / name, "eval"), strict=True):
        assert two["weights"] == one["weights"]
        assert two["pixel_accuracy"] == pytest.approx(one["pixel_accuracy"], abs=2e-3)
    for weights in ("ema", "student"):
        expected, found = (open_run(run, weights)[1].state_dict() for run in (alone, two_ranks / name))
        assert expected.keys() == found.keys()
        for key in expected:
            assert (expected[key].float() - found[key].float()).abs().max() < 2e-5, (name, weights, key)


@pytest.mark.parametrize("name", ["vit", "zero-3"])
def test_two_ranks_continue_exactly(two_ranks, name):
    whole, continued = records(two_ranks / name), records(two_ranks / "continued" / name)
    assert [r["loss"] for r in continued] == [r["loss"] for r in whole][3:]


def test_a_mistake_is_one_message_and_exit_code_2(make_recipe, tmp_path):
    recipe = make_recipe(data={"root": str(tmp_path / "nowhere")}).to_yaml()
    (tmp_path / "recipe.yaml").write_text(recipe)
    bin_folder = Path(sys.executable).parent
    command = [
        str(bin_folder / "deepspeed"), "--num_accelerators", "2", "--no_local_rank", "--master_port", str(_free_port()),
        "--module", "maskmatch_scale", "train", str(tmp_path / "recipe.yaml"),
    ]  # fmt: skip
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("maskmatch: error:") == 1
    assert "nowhere: no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
