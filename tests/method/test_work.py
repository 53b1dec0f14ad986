"""What a step is said to ask of the backbone is what it asks: the calls of a run are counted."""

import pytest
import torch

from maskmatch_scale.method.work import step_work
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.cost import encoder_macs, encoder_train_macs
from maskmatch_scale.recipe import MaskRecipe, MethodRecipe
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback
from tests.conftest import TINY_VIT

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "head": "linear"}


class Calls(Callback):
    """What student and teacher are asked for in each step, added up by the cost of a single image."""

    seen = None

    def before_step(self, step):
        type(self).seen = []

    def after_step(self, done, figures):
        student = self.run.student
        flops = tokens = 0
        for trained, (images, _, height, width), visible in self.seen:
            if not trained:
                flops += 2 * images * encoder_macs(student, height, width)
                continue
            flops += 2 * images * encoder_train_macs(student, height, width, visible)
            stride = student.encoder.strides[0]
            of_unit = (student.unit_px // stride) ** 2
            tokens += images * (height * width // stride**2 if visible is None else visible * of_unit)
        type(self).found.append(((tokens, flops), self.run.work_in(done - 1)))


@pytest.mark.parametrize("model", [VIT, None], ids=["vit", "segformer"])
@pytest.mark.parametrize(
    "method",
    [
        {"scales": [0.5, 1.0, 1.5], "burn_in": 0.5},
        {"mask": {"keep": 0.4, "mode": "zero"}},
        {"base": "supervised"},
        {"base": "supervised", "mask": {"keep": None}},
        {"strong_view": {"keep": 0.75}},
        {"strong_view": {"keep": 0.75}, "mask": {"keep": None}},
        {"mask": {"keep": 0.5, "complement": True}},
        {"views_of": "labelled"},
        {"base": "unimatch"},
        {"base": "unimatch", "strong_view": {"keep": 0.75}},
        {"base": "unimatch_v2"},
        {"base": "mean_teacher", "mask": {"keep": None}},
        {"scales": [0.5, 1.0], "teacher_margin_px": 24},
    ],
    ids=[
        *("burn-in", "zero", "mask-alone", "supervised", "dropped", "dropped-alone", "two-masks", "labelled"),
        *("unimatch", "unimatch-dropped", "unimatch_v2", "mean_teacher", "margin"),
    ],
)
def test_calls_of_a_run(make_recipe, monkeypatch, model, method):
    plain = Segmenter.encode

    def noted(self, images, visible=None, mode="drop"):
        dropped = visible.shape[1] if visible is not None and mode == "drop" else None
        Calls.seen.append((torch.is_grad_enabled(), tuple(images.shape), dropped))
        return plain(self, images, visible, mode)

    monkeypatch.setattr(Segmenter, "encode", noted)
    Calls.found, Calls.seen = [], []
    recipe = make_recipe(
        **({"model": model} if model else {}),
        method={"scales": [1.0], "mask": {"keep": 0.5}} | method,
        data={"crop_px": 64, "unlabelled_per_labelled": 2},
        engine={"accumulation": 2, "precision": "fp32"},
        run={"steps": 2, "evaluate_every": 0},
    )
    train(recipe, callbacks=[Calls])
    assert len(Calls.found) == 2
    for (tokens, flops), work in Calls.found:
        assert (work.tokens, work.flops) == (tokens, flops)
        assert flops > 0
    if "burn_in" in method:
        assert Calls.found[0][1].flops < Calls.found[1][1].flops / 3


def test_by_hand():
    """ViT-S/16 at 512 px: 1024 patches in 256 units, of which 77 stay visible at 0.3."""
    with torch.device("meta"):
        segmenter = build_segmenter("timm/vit_small_patch16_224", 21, image_size=512)
    work = step_work(segmenter, MethodRecipe(mask=MaskRecipe(keep=0.3), scales=(1.0,)), (512, 512), 1, 1)
    assert work.tokens == 1024 + 1024 + 4 * 77

    def forward(patches):
        tokens = patches + 1
        blocks = 12 * (12 * 384**2 * tokens + 2 * tokens**2 * 384)
        return 768 * 384 * patches, blocks

    embed, blocks = forward(1024)
    seen_embed, seen_blocks = forward(4 * 77)
    # Backward of the patch embedding has no gradient of the image.
    macs = 2 * (2 * embed + 3 * blocks) + (2 * seen_embed + 3 * seen_blocks) + embed + blocks
    assert work.flops == 2 * macs
