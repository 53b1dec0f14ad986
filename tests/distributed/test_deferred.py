"""At ZeRO-3 a model whose weights are made one at a time trains as one that was built whole: the same numbers."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from maskmatch_scale.checkpoints.reading import load_weights
from maskmatch_scale.models import build_segmenter
from tests.conftest import TINY_SEGFORMER, TINY_VIT, recipe_maker
from tests.distributed.launching import launch, records

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT}
SEGFORMER = {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER}
STEPS = 3

CASES = {
    "vit": {"model": VIT | {"head": "pixel_shuffle"}},
    "vit-dpt": {"model": VIT | {"head": "dpt", "backbone_options": TINY_VIT | {"depth": 4}}},
    "vit-pretrained": {"model": VIT | {"pretrained": "timm.safetensors"}},
    "vit-bf16": {"model": VIT, "engine": {"precision": "bf16"}},
    "vit-layer-decay": {"model": VIT, "optim": {"layer_decay": 0.5}},
    "vit-offload": {"model": VIT, "engine": {"offload_optimizer": True, "offload_parameters": True}},
    "segformer": {"model": SEGFORMER},
    "segformer-pretrained": {"model": SEGFORMER | {"pretrained": "segformer.safetensors"}},
    "segformer-autocast": {"model": SEGFORMER | {"head": "dpt"}, "engine": {"precision": "autocast-bf16"}},
    "segformer-per-rank": {"model": SEGFORMER | {"batchnorm": "per_rank"}},
    # DeepSpeed's default keeps all parameters of so small a model whole between steps.
    "vit-kept": {"model": VIT, "engine": {"deepspeed_json": None}},
}
RESUMED = ("vit-bf16", "segformer-per-rank")


def recipe_of(make, name, folder, files):
    case = {key: dict(value) for key, value in CASES[name].items()}
    model = case["model"]
    if "pretrained" in model:
        model["pretrained"] = str(files / model["pretrained"])
    engine = {"zero_stage": 3, "precision": "fp32", "deepspeed_json": str(files / "stage3.json")} | case.get(
        "engine", {}
    )
    run = {"dir": str(folder / name), "steps": STEPS, "checkpoint_every": 2, "evaluate_every": 0}
    optim = {"lr": 1e-3, "clip_norm": 0.5} | case.get("optim", {})
    return make(model=model, engine=engine, optim=optim, run=run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shapes):
    """A folder with a run of every case, for every way to build; runs that continue are in `again`."""
    folder = tmp_path_factory.mktemp("deferred")
    torch.manual_seed(5)
    # A file of timm's, for another size of image: its position embedding is resampled.
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT)
    save_file(vit.state_dict(), folder / "timm.safetensors")
    segformer = build_segmenter("transformers/segformer-b0", 3, backbone_options=TINY_SEGFORMER)
    save_file(segformer.state_dict(), folder / "segformer.safetensors")
    zero = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    (folder / "stage3.json").write_text(json.dumps({"zero_optimization": zero}))
    make = recipe_maker(shapes, folder)
    jobs = [
        {"recipe": recipe_of(make, name, folder / how, folder).model_dump(mode="json"), "built": how}
        for name in CASES
        for how in ("whole", "deferred")
    ]
    jobs += [
        {
            "recipe": recipe_of(make, name, folder / "again", folder).model_dump(mode="json"),
            "built": "deferred",
            "resume": str(folder / "whole" / name / "checkpoints" / "step-00000002"),
        }
        for name in RESUMED
    ]
    done = launch(jobs, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_as_of_a_model_built_whole(runs, name):
    whole, deferred = (records(runs / how / name) for how in ("whole", "deferred"))
    for key in ("loss", "loss_x", "loss_u", "loss_m", "grad_norm", "coverage"):
        assert [r[key] for r in deferred] == [r[key] for r in whole], key
    for weights in ("student", "ema"):
        one, other = (
            dict(load_weights(runs / how / name / "checkpoints" / f"step-{STEPS:08d}", weights))
            for how in ("whole", "deferred")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", RESUMED)
def test_it_continues_a_run_that_was_built_whole(runs, name):
    whole, again = (records(runs / how / name) for how in ("whole", "again"))
    assert [r["loss"] for r in again] == [r["loss"] for r in whole][2:]
