"""Multiply–adds by formula: equal to what torch dispatches in the library's own forward, and to sums by hand."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import SegformerModel

from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.cost import encoder_macs, encoder_train_macs


def on_meta(backbone: str) -> Segmenter:
    with torch.device("meta"):
        return build_segmenter(backbone, 2, context=False).eval()


@pytest.mark.parametrize(
    ("backbone", "height", "width"),
    [
        ("transformers/segformer-b0", 512, 512),
        ("transformers/segformer-b0", 101, 130),  # no whole units: convolutions pad and cut
        ("transformers/segformer-b2", 512, 512),
        ("timm/vit_small_patch16_224", 512, 512),
        ("timm/vit_small_patch14_reg4_dinov2", 140, 168),
        ("timm/eva02_small_patch14_224", 140, 168),  # gated MLP in one matrix, rotary embedding
        ("timm/eva02_base_patch14_224", 140, 168),  # gated MLP in two, separate query, key and value
        ("timm/vit_small_plus_patch16_dinov3", 128, 160),
        ("timm/vit_giant_patch14_dinov2", 140, 168),
    ],
)  # fmt: skip
def test_whole_images_cost_what_the_librarys_own_forward_dispatches(backbone: str, height: int, width: int) -> None:
    segmenter = on_meta(backbone)
    images = torch.zeros(1, 3, height, width, device="meta")
    library, _, name = backbone.partition("/")
    with torch.device("meta"):
        if library == "timm":
            theirs = timm.create_model(name, num_classes=0, img_size=(height, width)).eval()
        else:
            theirs = SegformerModel(segmenter.backbone.config).eval()

    def forward() -> Tensor:
        features = theirs.forward_features(images) if library == "timm" else theirs(images).last_hidden_state
        assert isinstance(features, Tensor)
        return features

    # Attention by its plain formula: the counter knows no flash kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    assert encoder_macs(segmenter, height, width) == counter.get_total_flops() / 2


@pytest.mark.parametrize("frozen", [None, 1, 3, "backbone"])
@pytest.mark.parametrize("backbone", ["transformers/segformer-b0", "timm/vit_small_patch16_224"])
def test_a_training_pass_costs_what_it_dispatches(backbone: str, frozen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks.harness import count_gmacs  # with torch's count of grouped convolutions set right

    segmenter = on_meta(backbone)
    whole = encoder_macs(segmenter, 128, 160)
    if frozen is not None:
        segmenter.freeze(frozen)
    images = torch.zeros(1, 3, 128, 160, device="meta")

    def train() -> None:
        levels = [level for level in segmenter.encode(images) if level.requires_grad]
        if levels:
            torch.autograd.backward(levels, [torch.zeros_like(level) for level in levels])

    assert encoder_macs(segmenter, 128, 160) == whole
    assert encoder_train_macs(segmenter, 128, 160) == pytest.approx(count_gmacs(train) * 1e9, rel=1e-12)


def test_segformer_b2_by_hand() -> None:
    """512 px, 77 of 256 units (keep 0.3): per stage 64, 16, 4 and 1 tokens a unit, and one key/value cell a unit."""
    segmenter = on_meta("transformers/segformer-b2")

    def pass_over(units: int) -> int:
        stage_1 = (
            64 * units * 7 * 7 * 3 * 64  # patch embedding, 7×7, 3 to 64 channels
            + 3 * units * 8 * 8 * 64 * 64  # spatial reduction, 8×8, in 3 blocks
            + 3 * 2 * 64 * units * 64 * 64  # query and output projection
            + 3 * 2 * units * 64 * 64  # key and value
            + 3 * 2 * 64 * units * units * 64  # attention: products with keys, products with values
            + 3 * 2 * 64 * units * 64 * 256  # MLP: 64 to 256 and back
            + 3 * 64 * units * 9 * 256  # depthwise 3×3
        )
        stage_2 = (
            16 * units * 3 * 3 * 64 * 128
            + 4 * units * 4 * 4 * 128 * 128
            + 4 * 2 * 16 * units * 128 * 128
            + 4 * 2 * units * 128 * 128
            + 4 * 2 * 16 * units * units * 128
            + 4 * 2 * 16 * units * 128 * 512
            + 4 * 16 * units * 9 * 512
        )
        stage_3 = (
            4 * units * 3 * 3 * 128 * 320
            + 6 * units * 2 * 2 * 320 * 320
            + 6 * 2 * 4 * units * 320 * 320
            + 6 * 2 * units * 320 * 320
            + 6 * 2 * 4 * units * units * 320
            + 6 * 2 * 4 * units * 320 * 1280
            + 6 * 4 * units * 9 * 1280
        )
        stage_4 = (
            units * 3 * 3 * 320 * 512  # one token a unit: no spatial reduction
            + 3 * 2 * units * 512 * 512
            + 3 * 2 * units * 512 * 512
            + 3 * 2 * units * units * 512
            + 3 * 2 * units * 512 * 2048
            + 3 * units * 9 * 2048
        )
        return stage_1 + stage_2 + stage_3 + stage_4

    full, visible = encoder_macs(segmenter, 512, 512), encoder_macs(segmenter, 512, 512, 77)
    assert full == pass_over(256) == 20_235_419_648
    assert visible == pass_over(77) == 5_267_834_880
    assert full / visible >= 3.8
    # Backward needs all products twice, but for the gradient of the images.
    images = 64 * 77 * 7 * 7 * 3 * 64
    assert encoder_train_macs(segmenter, 512, 512, 77) == 3 * 5_267_834_880 - images


def test_vit_small_by_hand() -> None:
    """512 px, 77 of 256 units: 4 patches of 16 px a unit, and the class token."""
    tokens = 4 * 77 + 1
    by_hand = 4 * 77 * 16 * 16 * 3 * 384  # patch embedding
    by_hand += 12 * tokens * 384 * 3 * 384  # query, key, value
    by_hand += 12 * 2 * tokens * tokens * 384  # attention
    by_hand += 12 * tokens * 384 * 384  # output projection
    by_hand += 12 * tokens * 2 * 384 * 1536  # MLP
    assert encoder_macs(on_meta("timm/vit_small_patch16_224"), 512, 512, 77) == by_hand


@pytest.mark.parametrize("backbone", ["transformers/segformer-b0", "timm/vit_small_patch14_reg4_dinov2"])
def test_all_units_visible_cost_the_whole_image(backbone: str) -> None:
    segmenter = on_meta(backbone)
    unit = segmenter.unit_px
    for cost in (encoder_macs, encoder_train_macs):
        assert cost(segmenter, 4 * unit, 5 * unit, 20) == cost(segmenter, 4 * unit, 5 * unit)


def test_units_that_are_not_there_are_refused() -> None:
    segmenter = on_meta("transformers/segformer-b0")
    with pytest.raises(ValueError, match="visible_units: 17 out of 4×4"):
        encoder_macs(segmenter, 128, 128, 17)
    with pytest.raises(ValueError, match="100×100"):
        encoder_macs(segmenter, 100, 100, 1)
    with pytest.raises(ValueError, match="whole patches"):
        encoder_macs(on_meta("timm/vit_small_patch16_224"), 100, 100)
