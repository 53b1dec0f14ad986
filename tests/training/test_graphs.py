"""Steps with views as graphs give the gradients of steps without, on the CPU with a recorder in the place of torch's.

With torch's recorder, on a GPU: tests/gpu.
"""

import pytest
import torch

from maskmatch_scale.engine.ddp import DdpEngine
from maskmatch_scale.train import train
from maskmatch_scale.training import preflight
from tests.conftest import TINY_VIT
from tests.static_memory import recorded_in_static_memory

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "head": "linear"}
ENGINE = {"library": "accelerate", "zero_stage": 0, "precision": "fp32"}


@pytest.fixture
def gradients(make_recipe, tmp_path, monkeypatch):
    """`gradients(graphs, micro_batch=…)`: of each step of a run, by name; and the shapes that were recorded."""
    monkeypatch.setattr(preflight, "check_graphs", lambda *_: None)  # it refuses graphs without a GPU
    found, shapes = [], []

    def record(view, samples, **options):
        shapes.append(tuple(tuple(sample.shape) for sample in samples))
        return recorded_in_static_memory(view, samples, **options)

    def step(engine, number, plain=DdpEngine.step):
        own = {name: p.grad for name, p in engine.student.named_parameters()}
        found.append({name: None if grad is None else grad.clone() for name, grad in own.items()})
        plain(engine, number)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(DdpEngine, "step", step)

    def run(graphs, **sections):
        found.clear()
        shapes.clear()
        engine = ENGINE | {"cuda_graphs": graphs} | sections.pop("engine")
        folder = {"dir": str(tmp_path / f"graphs-{graphs}"), "steps": 3, "evaluate_every": 0}
        train(make_recipe(model=VIT, engine=engine, run=folder, **sections))
        return list(found), list(shapes)

    return run


@pytest.mark.parametrize(
    ("method", "recorded"),
    [
        ({"mask": {"keep": 0.5}}, 2),  # the labelled and the strong view have one shape
        ({"mask": {"keep": 0.5}, "strong_view": {"keep": 0.5}}, 2),  # the strong and the masked view have one
        ({"mask": {"keep": 0.5}, "strong_view": {"keep": 0.25}, "burn_in": 0.34}, 3),
        ({"mask": {"keep": 0.5, "complement": True}, "burn_in": 0.34}, 2),
    ],
    ids=["whole", "dropped alike", "dropped, after a burn-in", "two masks, after a burn-in"],
)
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(1, 1), (2, 1), (1, 2)])
def test_gradients_are_those_without_graphs(gradients, method, recorded, micro_batch, accumulation):
    engine = {"micro_batch": micro_batch, "accumulation": accumulation}
    sections = {"method": {"scales": [1.0], "threshold": 0.0, "ema_decay": 0.0} | method, "optim": {"lr": 1e-3}}
    expected, none = gradients(False, engine=engine, **sections)
    found, shapes = gradients(True, engine=engine, **sections)
    assert not none
    assert len(shapes) == len(set(shapes)) == recorded
    assert len(found) == len(expected) == 3
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name, gradient in other.items():
            wanted = torch.zeros_like(one[name]) if gradient is None else gradient
            assert torch.allclose(one[name], wanted, rtol=1e-4, atol=1e-7), (step, name)
