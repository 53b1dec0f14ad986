"""A weak-to-strong base is one file and one line: bases that are defined here and registered by a fixture train.

One of them asks for two strong views and perturbs the student's features of the second, between backbone and head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from maskmatch_scale.method.bases import Base, PseudoLabels, build_base
from maskmatch_scale.method.draws import Drawn, ViewDraws
from maskmatch_scale.method.losses import cross_entropy_sum
from maskmatch_scale.method.views import Colours, Unlabelled, View
from maskmatch_scale.models.units import Grid, sample_visible
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.bases import BASES, BaseInfo
from maskmatch_scale.recipe.learning import uses_unlabelled
from maskmatch_scale.record.summary import summarise
from maskmatch_scale.seeds import generator
from maskmatch_scale.train import train
from tests.method.parts import MODELS, all_parts, first_batch, one_step


class Weak(Base):
    """The pseudo-label as the target of the weak view itself."""

    strong_views = 0
    trained_views = 1

    def views(self, unlabelled: Unlabelled) -> tuple[View, ...]:
        return (unlabelled.weak,)

    def loss_sum(self, logits: Sequence[Tensor], views: Sequence[View], pseudo: PseudoLabels) -> Tensor:
        return cross_entropy_sum(logits[0], pseudo.labels, pseudo.confident & views[0].valid)


class FeatureDropout(Base):
    """Two strong views; whole channels of the second one's features are dropped."""

    strong_views = trained_views = 2
    perturbs_features = True

    def views(self, unlabelled: Unlabelled) -> tuple[View, ...]:
        return unlabelled.strong_view(0), unlabelled.strong_view(1)

    def perturb(self, features: Sequence[list[Tensor]], unlabelled: Unlabelled) -> Sequence[list[Tensor]]:
        first, second = features
        return first, [level * kept(level, number, unlabelled) for number, level in enumerate(second)]

    def loss_sum(self, logits: Sequence[Tensor], views: Sequence[View], pseudo: PseudoLabels) -> Tensor:
        mixed = [pseudo.mixed(view.cutmix) for view in views]
        sums = [
            cross_entropy_sum(own, target.labels, target.confident & view.valid)
            for own, target, view in zip(logits, mixed, views, strict=True)
        ]
        return torch.stack(sums).sum() / 2


def kept(level: Tensor, number: int, unlabelled: Unlabelled) -> Tensor:
    """0 or 2 for each channel (U, C, 1, 1), drawn for each image by its position."""
    draws = [
        torch.rand(level.shape[1], generator=generator(unlabelled.seed, "feature dropout", number, position))
        for position in unlabelled.positions
    ]
    return (torch.stack(draws) > 0.5)[..., None, None].to(level) * 2


def units_by_hand(grid: Grid, purpose: str, unlabelled: Unlabelled) -> Tensor:
    """Half of four units: int64 (U, 2)."""
    draws = [generator(unlabelled.seed, f"strong mask{purpose}", position) for position in unlabelled.positions]
    return torch.cat([sample_visible(1, grid, 2, draw) for draw in draws])


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """`weak` and `feature_dropout` are names of bases."""
    monkeypatch.setitem(BASES, "weak", BaseInfo("Weak", f"{__name__}:Weak"))
    monkeypatch.setitem(BASES, "feature_dropout", BaseInfo("FeatureDropout", f"{__name__}:FeatureDropout"))


@pytest.mark.parametrize("model", MODELS)
def test_a_new_base_gives_the_loss_that_it_says(make_recipe: Callable[..., Recipe], registered: None, model: str):
    recipe = make_recipe(method={"base": "weak", "scales": [1.0], "threshold": 0.3, "mask": {"keep": None}})
    assert uses_unlabelled(recipe.method)
    module = one_step(recipe, model)
    step = module.prepare(first_batch(recipe, module))
    pseudo = module.pseudo_label(step, module.segmenter)
    _, sums = all_parts(module, step, pseudo, torch.ones(3, dtype=torch.float64))
    logits = module.segmenter(module.normalise(step.unlabelled.weak.images))
    expected = cross_entropy_sum(logits, pseudo.labels, pseudo.confident & step.unlabelled.weak.valid)
    torch.testing.assert_close(sums[1], expected.detach().to(sums.dtype), rtol=1e-9, atol=0)


@pytest.mark.parametrize("keep", [None, 0.5])
@pytest.mark.parametrize("model", MODELS)
def test_a_base_perturbs_features_of_the_views_it_names(
    make_recipe: Callable[..., Recipe], registered: None, model: str, keep: float | None
):
    strong_view = {"keep": keep}
    recipe = make_recipe(
        method={"base": "feature_dropout", "scales": [1.0], "threshold": 0.3, "strong_view": strong_view}
    )
    module = one_step(recipe, model)
    calls: list[int] = []
    module.segmenter.head.register_forward_pre_hook(lambda head, inputs: calls.append(len(inputs[0][0])))
    step = module.prepare(first_batch(recipe, module))
    pseudo = module.pseudo_label(step, module.segmenter)
    calls.clear()
    loss, sums = all_parts(module, step, pseudo, torch.ones(3, dtype=torch.float64))
    assert calls == [2, 2 + 2, 2]  # labelled images, both views of the base together, the masked view
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())

    # The same by hand, each view by itself.
    s, unlabelled = module.segmenter, step.unlabelled
    images = [module.normalise(view.images) for view in step.views]
    labelled = s(module.normalise(step.labelled_images))
    visible: Sequence[Tensor | None] = [None, None]
    if keep is not None:
        visible = [units_by_hand(s.unit_grid(64, 64), purpose, unlabelled) for purpose in ("", " 1")]
    features = s.encode(images[1], visible[1])
    if keep is None:
        features = [level * kept(level, n, unlabelled) for n, level in enumerate(features)]
    else:  # unit tokens (U, k, r, r, C)
        channels = [kept(level[:, 0, 0].mT, n, unlabelled).view(2, 1, 1, 1, -1) for n, level in enumerate(features)]
        features = [level * factor for level, factor in zip(features, channels, strict=True)]
    logits = [s(images[0], visible[0]), s.decode(features, (64, 64), visible[1])]
    expected = module.base.loss_sum(logits, step.views, pseudo)
    torch.testing.assert_close(sums[1], expected.detach().to(sums.dtype), rtol=1e-9, atol=0)
    expected = cross_entropy_sum(labelled, step.labels, step.labelled_pixels)
    torch.testing.assert_close(sums[0], expected.detach().to(sums.dtype), rtol=1e-9, atol=0)
    plain = module.base.loss_sum([logits[0], s(images[1], visible[1])], step.views, pseudo)
    assert not plain.detach().to(sums.dtype).isclose(sums[1], rtol=1e-6)


def test_a_run_with_a_new_base_trains_and_is_reported(
    make_recipe: Callable[..., Recipe], registered: None, monkeypatch: pytest.MonkeyPatch
):
    run = train(make_recipe(method={"base": "feature_dropout", "scales": [1.0], "threshold": 0.3}, run={"steps": 2}))
    summary = summarise(run)
    assert (summary.method, summary.steps_done, summary.scales) == ("FeatureDropout + mask", 2, (1.0,))
    # By a version of the package that does not have the base.
    monkeypatch.delitem(BASES, "feature_dropout")
    assert summarise(run).method == "feature_dropout + mask"


@pytest.mark.parametrize(
    ("name", "title"),
    [("mean_teacher", "Mean Teacher"), ("unimatch", "UniMatch"), ("unimatch_v2", "UniMatch V2")],
)
def test_mask_and_ensemble_go_with_any_base(make_recipe: Callable[..., Recipe], name: str, title: str):
    method = {"base": name, "scales": [0.5, 1.0], "mask": {"view": "strong"}}
    engine = {"precision": "fp32", "activation_checkpointing": True}
    run = train(make_recipe(model=MODELS["vit"], method=method, engine=engine, run={"steps": 2, "evaluate_every": 0}))
    assert summarise(run).method == f"{title} + mask"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [step for step in map(json.loads, lines) if step["kind"] == "train"]
    assert len(steps) == 2
    assert all(step["loss_u"] > 0 and step["loss_m"] > 0 for step in steps)


@pytest.mark.parametrize("name", BASES)
def test_the_table_says_of_every_base_what_it_does(name: str):
    base = build_base(name)
    weak = View(torch.zeros(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool), None)
    recipe = Recipe.model_fields["method"].default.strong_view
    draws = ViewDraws(recipe, 0, base.strong_views, (8, 8), None, 0)
    unlabelled = Unlabelled(weak, [0], Drawn(draws([0]), base.strong_views), recipe, 0, Colours())
    views = base.views(unlabelled)
    assert len(views) == base.trained_views
    assert bool(views) == BASES[name].unlabelled_loss
    assert sum(view is not weak for view in views) == base.strong_views
    assert base.perturbs_features == (type(base).perturb is not Base.perturb)
