"""Weights and thresholds by the names of classes: the numbers that losses and pseudo-labels see."""

import json

import pytest
import torch

from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback
from tests.method.test_maskmatch import build


class Look(Callback):
    """What the step of a run works with."""

    def started(self):
        type(self).maskmatch = self.run.maskmatch


def test_each_pseudo_label_has_the_threshold_of_its_class(make_recipe):
    plain, batch = build("vit", make_recipe(method={"threshold": 0.36}))
    module, _ = build("vit", make_recipe(), threshold=torch.tensor([0.36, 0.0, 1.0], dtype=torch.float64))
    step = module.prepare(batch)

    def teacher(images):
        """Every class somewhere, confidences between a third and 0.4."""
        return torch.randn(len(images), 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 8

    one, other = module.pseudo_label(step, teacher), plain.pseudo_label(step, teacher)
    assert one.labels.equal(other.labels)
    by_hand = torch.where(one.labels == 0, other.confident, one.labels == 1)
    assert one.confident.equal(by_hand)
    assert set(one.labels.unique().tolist()) == {0, 1, 2}
    assert 0 < other.confident[one.labels == 0].double().mean() < 1


@pytest.mark.parametrize("share", [0.3, 0.36, 0.95, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_number_for_all_classes_is_that_number(make_recipe, share, dtype):
    plain, batch = build("vit", make_recipe(method={"threshold": share}))
    module, _ = build("vit", make_recipe(), threshold=torch.full((3,), share, dtype=torch.float64))
    step = module.prepare(batch)

    def teacher(images):
        """Confidences of exactly `share`, as far as the dtype has it, and others."""
        first = torch.full((len(images), 1, 8, 8), share, dtype=dtype)
        return torch.cat([first, (1 - first) / 2, (1 - first) / 2], 1).log() * torch.linspace(0.9, 1.1, 8, dtype=dtype)

    assert module.pseudo_label(step, teacher).confident.equal(plain.pseudo_label(step, teacher).confident)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_looks_classes_up_by_their_names(make_recipe, precision):
    model = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": {"embed_dim": 24, "depth": 2, "num_heads": 2}}
    method = {"class_weights": {"disc": 0.3}, "threshold": {"default": 0.9, "square": 0.123}}
    recipe = make_recipe(
        model=model | {"num_classes": 4},
        method=method,
        engine={"precision": precision},
        run={"steps": 1, "evaluate_every": 0},
    )
    train(recipe, callbacks=[Look])
    assert Look.maskmatch.threshold.tolist() == [0.9, 0.123, 0.9, 0.9]
    assert Look.maskmatch.class_weight.tolist() == torch.tensor([1, 1, 0.3, 1]).tolist()


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [r[key] for r in lines if r["kind"] == "train" for key in ("loss", "coverage")]


def test_equal_values_by_name_train_as_one_value(make_recipe, tmp_path):
    by_name = {
        "class_weights": {"ground": 1.0, "disc": 1, "square": 1.0},
        "threshold": {"ground": 0.3, "disc": 0.3, "square": 0.3},
    }
    small = by_name | {"class_weights": dict.fromkeys(("ground", "disc", "square"), 1e-6)}
    found = []
    for name, method in (
        ("plain", {"threshold": 0.3}),
        ("by-name", by_name),
        ("small", small),  # their sum over all pixels is below 1
        ("default", {"threshold": {"default": 0.3}}),
    ):
        found.append(losses(train(make_recipe(method=method, run={"dir": str(tmp_path / name), "steps": 2}))))
    assert found[0][1] == 1  # every pixel counts; some of them: above
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    assert found[3] == found[0]
