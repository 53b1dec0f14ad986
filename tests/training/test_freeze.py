"""`optim.freeze` in a run, one rank: what is frozen stays what it was, in student and teacher, and costs no state.

Against plain PyTorch, on two ranks: tests/distributed/test_matrix.py.
"""

import json
from pathlib import Path

import pytest
import torch

from maskmatch_scale.checkpoints.finding import find
from maskmatch_scale.checkpoints.reading import load_weights
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import RecipeError
from maskmatch_scale.runs.model import build_student, open_run
from maskmatch_scale.train import train
from tests.conftest import TINY_VIT

VIT = {
    "backbone": "timm/vit_tiny_patch16_224",
    "backbone_options": TINY_VIT | {"depth": 3, "drop_path_rate": 0.5},
    "head": "pixel_shuffle",
}
ENGINES = {
    "accelerate": {"library": "accelerate", "zero_stage": 0},
    **{str(stage): {"zero_stage": stage} for stage in range(4)},
    "1-bf16": {"zero_stage": 1, "precision": "bf16"},
    "3-bf16": {"zero_stage": 3, "precision": "bf16"},
    "3-offload": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "2-checkpointing": {"zero_stage": 2, "activation_checkpointing": True},
}
SETTINGS = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 0}


def records(run: Path):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == "train"]


def recipe_of(make_recipe, engine, folder, **optim):
    engine = {"precision": "fp32"} | ENGINES[engine]
    optim = {"lr": 1e-3, "freeze": 2, "weight_decay": 0.5} | optim
    return make_recipe(model=VIT, engine=engine, optim=optim, run=SETTINGS | {"dir": str(folder)})


def start_of(recipe):
    return build_student(recipe, ShardIndex.load(recipe.data.root)).state_dict()


def is_frozen(name):
    return name.startswith("backbone.") and not name.startswith(("backbone.blocks.2.", "backbone.norm."))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_frozen_stays_bit_for_bit(make_recipe, tmp_path, engine):
    recipe = recipe_of(make_recipe, engine, tmp_path / "run")
    run = train(recipe)
    start = start_of(recipe)
    student, teacher = (open_run(run, weights)[1].state_dict() for weights in ("student", "ema"))
    frozen = {name for name in start if is_frozen(name)}
    assert len(frozen) == 4 + 2 * 12
    used = torch.bfloat16 if "bf16" in engine else torch.float32
    for name in frozen:
        assert teacher[name].equal(start[name]), name
        assert student[name].equal(start[name].to(used).float()), name
    moved = {name for name in start if not teacher[name].equal(start[name])}
    assert moved == {name for name in start if not student[name].equal(start[name])} - frozen == set(start) - frozen
    index = find(run).index
    assert {name.partition("/")[2] for name in index.tensors if name.startswith("exp_avg/")} == set(start) - frozen
    trained = sum(value.numel() for name, value in start.items() if name not in frozen)
    log = (run / "log" / "rank-0.txt").read_text()
    everything = sum(value.numel() for value in start.values())
    assert f"{everything / 1e6:.2f} M parameters ({trained / 1e6:.2f} M of them trained)" in log


@pytest.mark.parametrize("engine", ENGINES)
def test_it_continues_bit_for_bit(make_recipe, tmp_path, engine):
    whole = train(recipe_of(make_recipe, engine, tmp_path / "whole"))
    recipe = recipe_of(make_recipe, engine, tmp_path / "again")
    again = train(recipe, resume=str(whole / "checkpoints" / "step-00000002"))
    assert [r["loss"] for r in records(again)] == [r["loss"] for r in records(whole)][2:]
    for weights in ("student", "ema"):
        one, other = (open_run(run, weights)[1].state_dict() for run in (whole, again))
        assert all(one[name].equal(other[name]) for name in one)


def test_every_engine_takes_the_same_steps(make_recipe, tmp_path):
    runs = [
        train(recipe_of(make_recipe, engine, tmp_path / engine, layer_decay=0.5))
        for engine in ("accelerate", "0", "1", "2", "3", "3-offload", "2-checkpointing")
    ]
    first, *others = [[r["loss"] for r in records(run)] for run in runs]
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("engine", ["accelerate", "1", "1-bf16", "3"])
def test_of_what_is_frozen_later_the_teacher_takes_the_students_weights(make_recipe, tmp_path, engine):
    before = train(recipe_of(make_recipe, engine, tmp_path / "trained", freeze=None))
    from_step = before / "checkpoints" / "step-00000002"
    after = train(recipe_of(make_recipe, engine, tmp_path / "frozen"), resume=str(from_step))
    masters = load_weights(from_step, "student")
    student, teacher = (open_run(after, weights)[1].state_dict() for weights in ("student", "ema"))
    used = torch.bfloat16 if "bf16" in engine else torch.float32
    for name in filter(is_frozen, student):
        assert teacher[name].equal(masters[name])
        assert student[name].equal(masters[name].to(used).float())


@pytest.mark.parametrize("stage", [1, 3])
def test_the_whole_backbone_of_a_segformer(make_recipe, tmp_path, stage):
    engine = {"zero_stage": stage, "precision": "fp32"}
    recipe = make_recipe(engine=engine, optim={"freeze": "backbone"}, run=SETTINGS | {"dir": str(tmp_path / "run")})
    run, start = train(recipe), start_of(recipe)
    for weights in ("student", "ema"):
        found = open_run(run, weights)[1].state_dict()
        same = {name for name in start if found[name].equal(start[name])}
        assert {name for name in same if not name.endswith("proj.bias")} == {  # their gradient is 0: decision 0024
            name for name in start if name.startswith("backbone.") and not name.endswith("proj.bias")
        }


def test_more_blocks_than_there_are_are_refused(make_recipe, tmp_path):
    recipe = recipe_of(make_recipe, "1", tmp_path / "run", freeze=4)
    with pytest.raises(UserError) as caught:
        train(recipe)
    assert str(caught.value) == "optim.freeze=4: this ViT has 3 blocks; use a number from 1 to 3, backbone or null"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["head", 0, -1, 1.5, True])
def test_other_values_are_refused(make_recipe, value):
    with pytest.raises(RecipeError) as caught:
        make_recipe(optim={"freeze": value})
    shown = json.dumps(value)
    assert str(caught.value) == (
        f"recipe: optim.freeze={shown}: it must be null, backbone, or a number of layers from 1 on"
    )
