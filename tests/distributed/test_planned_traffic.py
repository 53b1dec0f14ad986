"""What a plan says that two ranks send in a step, against the collectives of a real step."""

import json
from pathlib import Path

import pytest

from maskmatch_scale.planning.build import build
from maskmatch_scale.planning.communication import step_traffic
from maskmatch_scale.planning.setting import Gpu
from tests.conftest import TINY_VIT, recipe_maker
from tests.distributed.launching import deepspeed

pytestmark = pytest.mark.distributed

CPU = Gpu("cpu", 10**10, 1e11, 1e11, 1e10, 0.0, "none")
# Large enough that the context decoder is a small part: at stage 3 what was read last is not gathered again.
SIZES = TINY_VIT | {"img_size": 64, "embed_dim": 96, "depth": 6}
VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": SIZES}
KINDS = {"allreduce": "all_reduce", "allgather": "all_gather", "reduce_scatter": "reduce_scatter"}
CASES = {
    **{f"stage {stage} {precision}": (VIT, {"zero_stage": stage, "precision": precision})
       for stage in range(4) for precision in ("fp32", "bf16", "autocast-bf16") if (stage, precision) != (0, "bf16")},
    "stage 2 accumulated": (VIT, {"zero_stage": 2, "precision": "fp32", "accumulation": 2}),
    "stage 3 accumulated": (VIT, {"zero_stage": 3, "precision": "bf16", "accumulation": 2}),
    "segformer": ({}, {"zero_stage": 1, "precision": "fp32"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory, shapes):
    folder = tmp_path_factory.mktemp("sent")
    make = recipe_maker(shapes, folder)
    zero = folder / "zero.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    recipes = {}
    for name, (model, engine) in CASES.items():
        sharded = {"deepspeed_json": str(zero)} if engine["zero_stage"] == 3 else {}
        recipes[name] = make(
            model=model,
            engine={"micro_batch": 2} | engine | sharded,
            method={"scales": [0.5, 1.0], "threshold": 0.3},
            run={"dir": str(folder / name), "steps": 2, "checkpoint_every": 0, "evaluate_every": 0},
        )
    (folder / "jobs.json").write_text(json.dumps([recipe.model_dump(mode="json") for recipe in recipes.values()]))
    done = deepspeed(Path(__file__).with_name("sent_recipes.py"), folder / "jobs.json", folder / "found.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    calls = json.loads((folder / "found.json").read_text())
    return {name: (recipe, one) for (name, recipe), one in zip(recipes.items(), calls, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_each_kind_of_collective(found, name):
    recipe, calls = found[name]
    planned = dict.fromkeys(KINDS.values(), 0.0)
    for traffic in step_traffic(build(recipe, CPU).subject, 2):
        planned[traffic.kind] += traffic.payload
    seen = dict.fromkeys(KINDS.values(), 0.0)
    for kind, size in calls:
        if kind == "broadcast":  # DeepSpeed compares the order of weights at ZeRO-3 once
            continue
        [known] = [name for name in KINDS if name in kind]
        seen[KINDS[known]] += size
    for kind, size in seen.items():
        assert planned[kind] == pytest.approx(size, rel=0.05, abs=2000), kind
