"""The teacher at ZeRO-3 on two ranks: what it sends, and that its pseudo-labels are a whole teacher's, bit for bit."""

import json
import math
import re

import pytest

from tests.conftest import TINY_VIT, recipe_maker
from tests.distributed.launching import deepspeed

pytestmark = pytest.mark.distributed

# A position embedding of 224 px would fill a bucket of SMALL, and what lies beside it would be sent twice.
SIZED = TINY_VIT | {"img_size": 64}
VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": SIZED}
DPT = VIT | {"backbone_options": SIZED | {"depth": 4}, "head": "dpt"}
SCALES = [0.5, 1.0, 1.5]
SMALL = {"stage3_prefetch_bucket_size": 2000}
NOTHING_KEPT = SMALL | {"stage3_max_live_parameters": 0}
SOME_KEPT = SMALL | {"stage3_max_live_parameters": 25_000}
FINE = VIT | {"backbone_options": SIZED | {"depth": 4, "patch_size": 8}}
CASES = {
    # Name → (model, engine, scales, zero_optimization of the DeepSpeed JSON)
    "vit-fp32-1": (VIT, {"precision": "fp32"}, [1.0], SMALL),
    "vit-fp32-3": (VIT, {"precision": "fp32"}, SCALES, SMALL),
    "vit-bf16-1": (VIT, {"precision": "bf16"}, [1.0], SMALL),
    "vit-bf16-3": (VIT, {"precision": "bf16"}, SCALES, SMALL),
    "vit-bf16-3-one-bucket": (VIT, {"precision": "bf16"}, SCALES, {}),
    "vit-bf16-3-offload": (
        VIT,
        {"precision": "bf16", "offload_parameters": True, "offload_optimizer": True},
        SCALES,
        SMALL,
    ),
    "vit-fp32-3-nothing-kept": (VIT, {"precision": "fp32"}, SCALES, NOTHING_KEPT),
    "vit-bf16-3-nothing-kept": (VIT, {"precision": "bf16"}, SCALES, NOTHING_KEPT),
    "vit-fp32-3-some-kept": (FINE, {"precision": "fp32"}, SCALES, SOME_KEPT),
    "dpt-autocast-3": (DPT, {"precision": "autocast-bf16"}, SCALES, SMALL),
    "pixel-shuffle-autocast-3": (VIT | {"head": "pixel_shuffle"}, {"precision": "autocast-bf16"}, SCALES, SMALL),
    "segformer-fp32-3": ({}, {"precision": "fp32"}, SCALES, SMALL),
    "segformer-autocast-3": ({}, {"precision": "autocast-bf16"}, SCALES, SMALL),
    "segformer-linear-bf16-3": ({"head": "linear"}, {"precision": "bf16"}, SCALES, SMALL),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, shapes):
    """What `teacher_recipes.py` says of every case."""
    folder = tmp_path_factory.mktemp("teacher")
    make = recipe_maker(shapes, folder)
    jobs = []
    for name, (model, engine, scales, zero) in CASES.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0} | zero}))
        recipe = make(
            model=model,
            engine={"micro_batch": 1, "zero_stage": 3, "accumulation": 2, "deepspeed_json": str(file)} | engine,
            optim={"lr": 1e-2},
            method={"scales": scales, "threshold": 0.3, "ema_decay": 0.7},
            evaluation={"window_batch": 16},
            run={"dir": str(folder / name), "steps": 1, "checkpoint_every": 0},
        )
        jobs.append(recipe.model_dump(mode="json"))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker = __file__.replace("test_sharded_teacher", "teacher_recipes")
    done = deepspeed(worker, folder / "jobs.json", folder / "found.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(zip(CASES, json.loads((folder / "found.json").read_text()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_its_pseudo_labels_are_those_of_a_whole_teacher(found, name):
    one = found[name]
    assert [one[what] for what in ("labels", "confidence", "logits")] == [True] * 3
    assert one["state"]  # read back from a whole state
    assert not one["there_after"]


def test_it_sends_each_weight_once_for_all_scales(found):
    for name in ("vit-fp32", "vit-bf16"):
        assert (
            sum(found[f"{name}-3"]["sent"]) == sum(found[f"{name}-1"]["sent"]) == sum(found[f"{name}-1"]["sent_alone"])
        )
    assert sum(found["vit-fp32-3"]["sent"]) == sum(_shard_bytes(found["vit-fp32-3"]).values())
    assert len(found["vit-bf16-3"]["sent"]) > 10 > len(found["vit-bf16-3-one-bucket"]["sent"])


def test_in_16_bits_it_sends_products_in_16_bits(found):
    """And biases, norms and embeddings in fp32, as they are read."""
    for name in ("vit-bf16-3", "vit-bf16-3-one-bucket", "vit-bf16-3-offload", "dpt-autocast-3"):
        sizes = _shard_bytes(found[name])
        norms = re.compile(r"norm|bias|pos_embed|cls_token|token")
        halved = [size if norms.search(key) else size / 2 for key, size in sizes.items()]
        assert sum(found[name]["sent"]) == sum(halved), name
    # SegFormer's head multiplies weights together in fp32.
    one = found["segformer-autocast-3"]
    head = sum(size for key, size in _shard_bytes(one).items() if key.startswith("head."))
    assert head + sum(_shard_bytes(one).values()) < 2 * sum(one["sent"]) < 2 * sum(_shard_bytes(one).values())


def test_beyond_its_bound_it_sends_weights_again(found):
    whole = sum(found["vit-fp32-3"]["sent"])
    nothing, some = found["vit-fp32-3-nothing-kept"], found["vit-fp32-3-some-kept"]
    assert nothing["kept"] == 0
    assert sum(nothing["sent"]) == 3 * whole == 3 * sum(nothing["sent_alone"])
    assert 0 < some["kept"] < 25_000
    # fp32, two ranks: what is kept is sent once, the rest three times.
    assert sum(some["sent"]) == 3 * sum(some["sent_alone"]) - 2 * some["kept"] * 4 / 2
    # Norms are read between products and are not sent again each time.
    assert sum(found["vit-bf16-3-nothing-kept"]["sent"]) == 3 * sum(found["vit-bf16-3"]["sent"])


def _shard_bytes(one):
    """fp32 bytes of a rank's part of every parameter that a teacher reads."""
    return {key: 4 * math.ceil(math.prod(shape) / 2) for key, shape in one["sizes"].items() if "context" not in key}
