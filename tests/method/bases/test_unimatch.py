"""UniMatch's loss against the paper's formula, each view by itself, with whole logits in float64."""

import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.method.bases.unimatch import UniMatch
from tests.method.parts import MODELS, colour_teacher, first_batch, one_step

METHOD = {"base": "unimatch", "threshold": 0.7, "strong_view": {"cutmix_probability": 1.0}}


def mean_of_view(logits, labels, confident, valid):
    """Σ_ω 1[c ≥ τ] CE / |ω|."""
    up = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    return (F.cross_entropy(up, labels, reduction="none") * confident * valid).sum() / valid.sum()


def terms_of(module, step, pseudo, dropped):
    """L_s1, L_s2 and L_fp, given the features of the weak view with dropped channels."""
    s, terms = module.segmenter, []
    for view in step.views[:2]:
        mix = [torch.where(view.cutmix.inside, own.flip(0), own) for own in (pseudo.labels, pseudo.confident)]
        terms.append(mean_of_view(s(module.normalise(view.images)), *mix, view.valid))
    weak = step.unlabelled.weak
    terms.append(mean_of_view(s.decode(dropped, (64, 64)), pseudo.labels, pseudo.confident, weak.valid))
    return terms


def weak_features(module, step):
    """Features of the weak view before and after the base's perturbation, as `decode` is given them."""
    given = []
    plain = UniMatch.perturb

    class Noted(UniMatch):
        def perturb(self, features, unlabelled):
            result = plain(self, features, unlabelled)
            given.extend((features, result))
            return result

    module.base = Noted()
    return given


@pytest.mark.parametrize("keep", [None, 0.5])
@pytest.mark.parametrize("model", MODELS)
def test_loss_equals_the_papers_formula(make_recipe, model, keep):
    recipe = make_recipe(method=METHOD | {"mask": {"keep": keep}})
    module = one_step(recipe, model)
    step = module.prepare(first_batch(recipe, module))
    assert all(view.valid.all() for view in step.views)  # no padding: equally many valid pixels
    pseudo = module.pseudo_label(step, colour_teacher)
    given = weak_features(module, step)
    loss, _ = module("loss_u", step, pseudo, 1 / module.denominators(step))

    before, after = given
    assert all(own is changed for own, changed in zip(before[:2], after[:2], strict=True))  # strong views as they are
    for own, changed in zip(before[2], after[2], strict=True):
        factors = changed / own
        assert set(factors.unique().round(decimals=9).tolist()) == {0.0, 2.0}
        # A channel of an image is dropped as a whole.
        assert factors.flatten(2).std(2).max() < 1e-9
    first, second, perturbed = terms_of(module, step, pseudo, after[2])
    assert 0.1 < pseudo.confident.double().mean() < 0.9
    assert pseudo.labels.unique().numel() == 3
    torch.testing.assert_close(loss, 0.5 * perturbed + 0.5 / 2 * (first + second), rtol=1e-9, atol=0)
    loss.backward()
    assert all(p.grad is not None for name, p in module.named_parameters() if "context" not in name)


def test_with_padding_a_view_counts_by_its_valid_pixels(make_recipe):
    recipe = make_recipe(method=METHOD, data={"scale_range": [0.5, 0.9]})
    module = one_step(recipe, "vit")
    step = module.prepare(first_batch(recipe, module))
    pseudo = module.pseudo_label(step, colour_teacher)
    given = weak_features(module, step)
    loss, _ = module("loss_u", step, pseudo, 1 / module.denominators(step))
    pixels = torch.stack([view.valid.sum() for view in step.views]).double()
    assert pixels.unique().numel() > 1
    terms = terms_of(module, step, pseudo, given[1][2])
    share = pixels / pixels.mean()
    expected = sum(weight * own * term for weight, own, term in zip((0.25, 0.25, 0.5), share, terms, strict=True))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_levels_are_dropped_independently_of_each_other_and_of_the_batch(make_recipe):
    recipe = make_recipe(method=METHOD, data={"unlabelled_per_labelled": 2})
    module = one_step(recipe, "vit")
    unlabelled = module.prepare(first_batch(recipe, module)).unlabelled
    assert len(unlabelled.positions) == 4
    ones = [torch.ones(4, 4096, 1, 1), torch.ones(4, 4096, 2, 2)]
    first, second = UniMatch().perturb([ones, ones, ones], unlabelled)[2]
    kept = torch.stack([first[:, :, 0, 0], second[:, :, 0, 0]]).flatten(0, 1) / 2
    assert (kept.mean(1) - 0.5).abs().max() < 4 * 0.5 / 4096**0.5
    # Pairs of rows: of the levels and of the images.
    assert (torch.corrcoef(kept) - torch.eye(8)).abs().max() < 4.5 / 4096**0.5
