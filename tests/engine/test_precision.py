"""Which precision a run gets, and what a machine refuses. The GPU is pretended: only its answers matter here."""

import pytest
import torch

from maskmatch_scale.engine.precision import choose_precision
from maskmatch_scale.errors import UserError


@pytest.fixture
def gpu(monkeypatch):
    """Pretend a GPU, with or without bf16."""

    def pretend(*, bf16):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)

    return pretend


def chosen(make_recipe, *, batchnorm=False, **engine):
    return choose_precision(make_recipe(engine=engine), batchnorm=batchnorm)


def test_auto_without_a_gpu(make_recipe):
    assert chosen(make_recipe, precision="auto") == ("fp32", "engine.precision=auto, and there is no GPU")


@pytest.mark.parametrize(
    ("bf16", "batchnorm", "stage", "precision", "reason"),
    [
        (True, False, 1, "bf16", "can use bf16 weights"),
        (True, True, 1, "autocast-bf16", "BatchNorm"),
        (True, False, 0, "autocast-bf16", "engine.zero_stage=0"),
        (False, False, 1, "fp32", "Some GPU has no bf16"),
    ],
)
def test_auto_on_a_gpu(make_recipe, gpu, bf16, batchnorm, stage, precision, reason):
    gpu(bf16=bf16)
    found, why = chosen(make_recipe, precision="auto", batchnorm=batchnorm, zero_stage=stage)
    assert found == precision
    assert reason in why


@pytest.mark.parametrize(
    ("engine", "batchnorm", "parts"),
    [
        ({"precision": "fp16"}, False, ["engine.precision=fp16", "needs a GPU", "autocast-bf16"]),
        ({"precision": "bf16"}, True, ["engine.precision=bf16", "BatchNorm", "autocast-bf16"]),
    ],
)
def test_what_cannot_be_is_refused(make_recipe, engine, batchnorm, parts):
    with pytest.raises(UserError) as caught:
        chosen(make_recipe, batchnorm=batchnorm, **engine)
    assert all(part in str(caught.value) for part in parts)


def test_a_gpu_without_bf16(make_recipe, gpu):
    gpu(bf16=False)
    with pytest.raises(UserError, match="Some GPU has no bf16 arithmetic; use fp16 or fp32"):
        chosen(make_recipe, precision="autocast-bf16")
    assert chosen(make_recipe, precision="fp16") == ("fp16", "engine.precision")
