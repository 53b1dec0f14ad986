"""Tokens/s and MFU by hand; nothing is read before the step's time is known."""

from types import SimpleNamespace

import pytest
import torch

from maskmatch_scale.method.work import Work
from maskmatch_scale.training.callbacks import throughput
from maskmatch_scale.training.callbacks.throughput import Throughput
from maskmatch_scale.training.step import StepFigures


def figures_of(make_recipe, device, *, precision="bf16", left_out=False):
    recipe = make_recipe(engine={"precision": precision})
    runtime = SimpleNamespace(device=torch.device(device), world_size=4)
    work = Work(tokens=1000, flops=5 * 10**13)
    run = SimpleNamespace(recipe=recipe, runtime=runtime, work_in=lambda step: work)
    asked = []
    figures = StepFigures(later={"step_s": lambda: asked.append(1) or 0.5}, left_out=left_out)
    Throughput(run).after_step(1, figures)
    assert not asked
    return figures.known | {name: ask() for name, ask in figures.later.items()}


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989), ("autocast-bf16", 989), ("fp32", 495)])
def test_on_a_known_gpu(make_recipe, monkeypatch, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    found = figures_of(make_recipe, "cuda", precision=precision)
    assert found["tokens_per_s"] == 4 * 1000 / 0.5
    # A rank's work over what its own GPU could do in the time of the step.
    assert found["mfu"] == pytest.approx(50 / (0.5 * peak))
    assert figures_of(make_recipe, "cuda", left_out=True)["mfu"] is None


def test_none_where_the_peak_is_not_known(make_recipe, monkeypatch):
    assert figures_of(make_recipe, "cpu")["mfu"] is None
    monkeypatch.setattr(throughput, "peak_tflops", lambda device, dtype, tf32: None)
    found = figures_of(make_recipe, "cuda")
    assert found["mfu"] is None
    assert found["tokens_per_s"] == 8000
