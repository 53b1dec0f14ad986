"""Views of labelled images with their own labels (`method.views_of: labelled`), against the formula in float64."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.errors import UserError
from maskmatch_scale.method.maskmatch import view_draws
from maskmatch_scale.models.units import visible_pixel_mask
from maskmatch_scale.recipe.sections import RecipeError
from maskmatch_scale.record.summary import summarise
from maskmatch_scale.train import train
from tests.method.parts import MODELS, all_parts, one_step

LABELLED = {"views_of": "labelled", "mask": {"keep": 0.5, "pixels": "masked"}}


def batches_of(recipe, module, rank=0, ranks=1):
    draw = view_draws(module.segmenter, recipe.method, recipe.run.seed, recipe.data.crop_px)
    return TrainingBatches(recipe, 3, rank, ranks, unlabelled=False, draw=draw)


def no_teacher(images):
    raise AssertionError("labelled images have labels")


@pytest.mark.parametrize("keep", [None, 0.5])
@pytest.mark.parametrize("model", MODELS)
def test_losses_equal_the_formulas(make_recipe, model, keep):
    strong_view = {"keep": keep, "cutmix_probability": 1.0}
    recipe = make_recipe(
        method=LABELLED | {"strong_view": strong_view, "unlabelled_weight": 0.4}, data={"scale_range": [0.5, 0.9]}
    )
    module = one_step(recipe, model)
    (batch,) = load_batches(batches_of(recipe, module), 0, 1)
    step = module.prepare(batch)
    pseudo = module.pseudo_label(step, no_teacher)
    loss, sums = all_parts(module, step, pseudo, 1 / module.denominators(step))

    s, labels = module.segmenter, batch.labels.long().masked_fill(batch.labels == 255, -100)

    def cross_entropy(images, target, visible=None):
        logits = F.interpolate(s(module.normalise(images), visible), size=(64, 64), mode="bilinear")
        return F.cross_entropy(logits, target)

    images, (view,) = batch.labelled_images / 255, step.views
    mixed = torch.where(view.cutmix.inside, labels.flip(0), labels)
    assert not mixed.equal(labels)
    seen = visible_pixel_mask(step.masked.visible, s.unit_grid(64, 64), s.unit_px)
    expected = torch.stack(
        [
            cross_entropy(images, labels),
            cross_entropy(view.images, mixed, step.visible),
            cross_entropy(images, labels.masked_fill(seen, -100), step.masked.visible),
        ]
    )
    torch.testing.assert_close(sums / module.denominators(step), expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, expected[0] + 0.4 * expected[1] + expected[2], rtol=1e-9, atol=0)


def test_draws_depend_on_the_place_and_not_on_the_rank(make_recipe):
    recipe = make_recipe(method=LABELLED | {"burn_in": 0.5}, data={"lanes": 2}, run={"steps": 4})
    half = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"micro_batch": 1})})
    module = one_step(recipe, "vit")
    whole, ranks = batches_of(recipe, module), [batches_of(half, module, rank, 2) for rank in (0, 1)]
    for number in range(4):
        positions = whole[number].positions
        assert positions == ranks[0][number].positions + ranks[1][number].positions
        assert whole[number].draws.equal(torch.cat([rank[number].draws for rank in ranks]))
        # Nothing in the burn-in.
        assert (len(positions), module.prepare(whole[number]).parts) == (
            (0, ("loss_x",)) if number < 2 else (2, ("loss_x", "loss_u", "loss_m"))
        )
    assert not whole[2].draws.equal(whole[3].draws)


@pytest.mark.parametrize("base", ["supervised", "fixmatch"])
def test_a_run_reads_no_unlabelled_images(make_recipe, shapes, tmp_path, base):
    root = shutil.copytree(shapes, tmp_path / "shapes")
    index = json.loads((root / "index.json").read_text())
    del index["streams"]["unlabelled"]
    (root / "index.json").write_text(json.dumps(index))
    recipe = make_recipe(
        method=LABELLED | {"base": base},
        data={"root": str(root), "crop_px": 64, "workers": 1},
        engine={"precision": "fp32"},
        run={"steps": 2, "evaluate_every": 0},
    )
    run = train(recipe)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in (line for line in lines if line["kind"] == "train"):
        assert record["loss_m"] > 0
        assert record["coverage"] is None
        assert (record["loss_u"] is None) == (base == "supervised")
        # Distinct images, not views.
        assert record["images_per_s"] * record["step_s"] == pytest.approx(2)
    summary = summarise(run)
    assert summary.method == {"supervised": "supervised + mask", "fixmatch": "MaskMatch"}[base] + (
        ", views of labelled images"
    )
    assert summary.scales == ()


def test_what_has_no_labels_is_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"data\.labelled_count=0 with method\.views_of=labelled"):
        make_recipe(method=LABELLED, data={"labelled_count": 0}, model={"pretrained": "run"})
    recipe = make_recipe(method=LABELLED | {"base": "mean_teacher"}, engine={"precision": "fp32"}, run={"steps": 1})
    with pytest.raises(UserError, match=r"method\.views_of=labelled with method\.base=mean_teacher: "):
        train(recipe)
