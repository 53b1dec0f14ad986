"""UniMatch V2's loss and its complementary channels against the paper's formula."""

import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.method.bases.unimatch_v2 import UniMatchV2
from maskmatch_scale.method.draws import Drawn
from maskmatch_scale.method.views import Colours, Unlabelled, View
from maskmatch_scale.models.units import stack_units, unstack_units
from maskmatch_scale.recipe import StrongViewRecipe
from tests.method.parts import MODELS, colour_teacher, first_batch, one_step


def unlabelled_of(seeds):
    """Images with these seeds for their features; nothing else of them is read."""
    rows = torch.zeros(len(seeds), 2 * 12 + 1, dtype=torch.float64)
    rows[:, -1] = torch.tensor(seeds)
    weak = View(torch.zeros(len(seeds), 3, 8, 8), torch.ones(len(seeds), 8, 8, dtype=torch.bool), None)
    return Unlabelled(weak, range(len(seeds)), Drawn(rows, 2, feature_seed=True), StrongViewRecipe(), 0, Colours())


def factors_of(seeds, channels, levels=1):
    """What each view's channels are multiplied by: (2, levels, U, channels)."""
    ones = [torch.ones(len(seeds), channels, 2, 3) for _ in range(levels)]
    views = UniMatchV2().perturb([ones, ones], unlabelled_of(seeds))
    assert all(level.flatten(2).std(2).eq(0).all() for view in views for level in view)
    return torch.stack([torch.stack([level[..., 0, 0] for level in view]) for view in views])


def test_channels_are_complementary_and_shared_by_the_levels():
    first, second = factors_of(list(range(400)), 512, levels=3)
    assert (first + second).eq(2).all()
    assert first.eq(first[:1]).all()
    whole = first[0].eq(1).all(1)
    assert set(first[0][~whole].unique().tolist()) == {0.0, 2.0}
    # Half of the images, half of the channels.
    assert abs(whole.float().mean() - 0.5) < 4 * 0.5 / 400**0.5
    dropped = first[0][~whole] / 2
    assert abs(dropped.mean() - 0.5) < 4 * 0.5 / dropped.numel() ** 0.5
    assert (dropped.mean(1) - 0.5).abs().max() < 4.5 * 0.5 / 512**0.5
    assert (dropped.mean(0) - 0.5).abs().max() < 4.5 * 0.5 / len(dropped) ** 0.5


def test_an_image_has_its_channels_in_any_batch():
    assert factors_of([5, 6, 7], 64)[:, :, 2].equal(factors_of([7], 64)[:, :, 0])
    assert factors_of([5, 6, 7], 64)[..., :32].equal(factors_of([5, 6, 7], 32))


def test_unit_tokens_are_dropped_like_maps():
    seeds = list(range(8))
    maps = torch.randn(8, 16, 4, 4)
    tokens = maps.permute(0, 2, 3, 1)[:, None]  # one unit of 4 × 4 tokens
    of_maps, of_tokens = (
        UniMatchV2().perturb([[own], [own]], unlabelled_of(seeds)) for own in (maps, stack_units(tokens))
    )
    for plain, other in zip(of_maps, of_tokens, strict=True):
        assert plain[0].permute(0, 2, 3, 1)[:, None].equal(unstack_units(other[0]))


@pytest.mark.parametrize("keep", [None, 0.5])
@pytest.mark.parametrize("model", MODELS)
def test_loss_equals_the_papers_formula(make_recipe, model, keep):
    method = {"base": "unimatch_v2", "threshold": 0.7, "strong_view": {"cutmix_probability": 1.0}}
    recipe = make_recipe(method=method | {"mask": {"keep": keep}}, data={"unlabelled_per_labelled": 2})
    module = one_step(recipe, model)
    step = module.prepare(first_batch(recipe, module))
    assert all(view.valid.all() for view in step.views)
    pseudo = module.pseudo_label(step, colour_teacher)
    assert 0.1 < pseudo.confident.double().mean() < 0.9
    loss, _ = module("loss_u", step, pseudo, 1 / module.denominators(step))

    s, partner, terms = module.segmenter, [1, 0, 3, 2], []
    seeds = step.unlabelled.drawn.feature_seeds.tolist()
    assert len(set(seeds)) == 4
    assert not factors_of(seeds, 64).eq(1).all()
    for number, view in enumerate(step.views):
        factors = [
            factors_of(seeds, level.shape[1])[number, 0].double()[..., None, None]
            for level in s.encode(module.normalise(view.images))
        ]
        features = s.encode(module.normalise(view.images))
        logits = s.decode([level * own for level, own in zip(features, factors, strict=True)], (64, 64))
        up = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
        box = view.cutmix.inside
        labels, confident = (torch.where(box, own[partner], own) for own in (pseudo.labels, pseudo.confident))
        terms.append((F.cross_entropy(up, labels, reduction="none") * confident).mean())
    torch.testing.assert_close(loss, (terms[0] + terms[1]) / 2, rtol=1e-9, atol=0)
