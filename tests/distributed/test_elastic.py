"""A run that goes on elsewhere has the losses of one that did not: one rank, two, one; other stages and engines."""

import shutil
from pathlib import Path

import pytest

from maskmatch_scale.train import train
from tests.conftest import TINY_VIT, recipe_maker
from tests.distributed.launching import launch, records

pytestmark = pytest.mark.distributed

STEPS = 6
VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "head": "pixel_shuffle"}
ON_TWO = {
    "stage-1": {"zero_stage": 1},
    "stage-3": {"zero_stage": 3},
    "accelerate": {"library": "accelerate", "zero_stage": 0},
}


def recipe_of(make, folder, name, ranks, **engine):
    """Four images a step on any number of ranks, read in two lanes."""
    return make(
        model=VIT,
        engine={"micro_batch": 4 // ranks, "precision": "fp32"} | engine,
        data={"lanes": 2},
        optim={"lr": 1e-3, "warmup_steps": 2},
        run={"dir": str(folder / name), "steps": STEPS, "checkpoint_every": 2, "keep_last": 3, "evaluate_every": 0},
    )


def step(folder, name, number):
    return str(folder / name / "checkpoints" / f"step-{number:08d}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shapes):
    """`alone` on one rank; from its second step on two ranks, in several ways; from their fourth step on one again."""
    folder = tmp_path_factory.mktemp("elastic")
    make = recipe_maker(shapes, folder)
    train(recipe_of(make, folder, "alone", 1))
    jobs = [
        {
            "recipe": recipe_of(make, folder, name, 2, **engine).model_dump(mode="json"),
            "resume": step(folder, "alone", 2),
        }
        for name, engine in ON_TWO.items()
    ]
    shutil.copytree(folder / "alone", folder / "damaged")
    part = next(Path(step(folder, "damaged", STEPS)).glob("part-*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    jobs.append({"recipe": recipe_of(make, folder, "damaged", 2).model_dump(mode="json"), "resume": "auto"})
    done = launch(jobs, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ON_TWO:
        train(recipe_of(make, folder, f"{name}-back", 1, zero_stage=2), step(folder, name, 4))
    return folder


@pytest.mark.parametrize("name", ON_TWO)
def test_one_two_one(runs, name):
    alone, two, back = (records(runs / run) for run in ("alone", name, f"{name}-back"))
    assert [r["step"] for r in two] == [3, 4, 5, 6]
    assert [r["step"] for r in back] == [5, 6]
    for part, expected in ((two, alone[2:]), (back, alone[4:])):
        for key in ("loss", "loss_x", "loss_u", "loss_m"):
            # The order of sums over images differs.
            assert [r[key] for r in part] == pytest.approx([r[key] for r in expected], rel=1e-6), key


def test_ranks_agree_on_a_damaged_checkpoint(runs):
    for rank in (0, 1):
        log = (runs / "damaged" / "log" / f"rank-{rank}.txt").read_text()
        assert "passed over: " in log
        assert "is damaged: its checksum is not that of index.json" in log
    again = records(runs / "damaged")[STEPS:]
    assert [r["step"] for r in again] == [5, 6]
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in records(runs / "alone")[4:]], rel=1e-6)


def test_what_changed_is_told(runs):
    log = (runs / "stage-3" / "log" / "rank-1.txt").read_text()
    assert "continued from step 2 with world_size=2 (was 1), zero_stage=3 (was 1)" in log
    assert "images instead of" not in log
