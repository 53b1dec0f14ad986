"""Kinds of backbones, by what their architectures do differently: each drops exactly, takes any size, or is refused."""

import copy

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from maskmatch_scale.models import build_segmenter, units
from maskmatch_scale.models.vit.encoder import VitEncoder

from .conftest import VITS
from .test_vit_reference import masked_reference

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SUPPORTED = {
    "augreg": "vit_tiny_patch16_224.augreg_in21k",
    "patch 32": "vit_base_patch32_224",
    "CLIP: norm before the blocks": "vit_base_patch16_clip_224",
    "CLIP: quick GELU": "vit_base_patch16_clip_quickgelu_224",
    "DINOv2 with registers": "vit_small_patch14_reg4_dinov2",
    "DINOv2 giant: gated MLP": "vit_giant_patch14_dinov2",
    "SigLIP: no class token, attention pooling": "vit_base_patch16_siglip_224",
    "SigLIP without pooling parameters": "vit_base_patch16_siglip_gap_224",
    "SigLIP 2": "vit_base_patch16_siglip_gap_224.v2_webli",
    "average pooling: norm in the head": "vit_base_patch16_224_miil",
    "average pooling, no class token": "vit_base_patch16_gap_224",
    "DeiT III: position without class token": "deit3_small_patch16_224",
    "parallel blocks": "vit_base_patch16_xp_224",
    "FlexiViT": "flexivit_small",
    "EVA02": "eva02_tiny_patch14_224",
    "EVA02 base: unfused projections": "eva02_base_patch14_224",
    "EVA": "eva_giant_patch14_224",
    "DINOv3": "vit_small_patch16_dinov3",
    "DINOv3 plus: gated MLP": "vit_small_plus_patch16_dinov3",
    "rotary, learned frequencies": "vit_small_patch16_rope_mixed_224",
    "rotary and absolute positions": "vit_small_patch16_rope_ape_224",
    "rotary, register, no class token": "vit_medium_patch16_rope_reg1_gap_256",
    "PE spatial": "vit_pe_spatial_tiny_patch16_512",
}


def build(name, **arguments):
    torch.manual_seed(0)
    segmenter = build_segmenter(f"timm/{name}", 3, backbone_options=SMALL, **arguments).double().eval()
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return segmenter


def masked_images(segmenter, rows, cols, k=4):
    unit = segmenter.unit_px
    images = torch.randn(2, 3, rows * unit, cols * unit, dtype=torch.float64)
    return images, units.sample_visible(2, (rows, cols), k, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SUPPORTED.values(), ids=SUPPORTED)
def test_drop_mode_is_masked_attention_at_sizes_never_seen_before(name):
    segmenter = build(name, context=False)
    r = segmenter.unit_px // segmenter.patch_px
    for rows, cols in ((3, 4), (5, 2), (4, 4)):
        images, visible = masked_images(segmenter, rows, cols)
        patches = units.visible_unit_mask(visible, (rows, cols)).repeat_interleave(r, 1).repeat_interleave(r, 2)
        (features,) = segmenter.encode(images, visible)
        expected = masked_reference(segmenter.backbone, images, patches).unflatten(1, patches.shape[1:])
        expected = units.gather_units(expected.permute(0, 3, 1, 2).contiguous(), visible, (rows, cols))
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SUPPORTED.values(), ids=SUPPORTED)
def test_every_parameter_of_every_kind_learns_and_all_visible_is_the_whole_image(name):
    segmenter = build(name)
    images, visible = masked_images(segmenter, 3, 4)
    segmenter(images, visible).square().sum().backward()
    assert not [n for n, p in segmenter.named_parameters() if p.grad is None]
    everything = torch.arange(12).expand(2, -1)
    whole = segmenter(images)
    torch.testing.assert_close(segmenter(images, everything), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_built_for_one_size_and_called_at_others(name, head):
    options = {**SMALL, "depth": 4}
    patch = 14 if "14" in name else 16
    segmenter = build_segmenter(
        f"timm/{name}", 3, head=head, image_size=(4 * patch, 6 * patch), unit_px=patch, backbone_options=options
    )
    finer = 4 if head == "dpt" else 1
    for rows, cols in ((4, 6), (3, 7), (9, 5)):  # the half-stride level of dpt is rounded up
        images = torch.randn(1, 3, rows * patch, cols * patch)
        visible = units.sample_visible(1, (rows, cols), 5)
        for mask in (None, visible):
            assert segmenter(images, mask).shape == (1, 3, finer * rows, finer * cols)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_kept_tokens_keep_their_rotation(name, monkeypatch):
    """A rotation of other places gives other features, so that agreement with the reference means something."""
    segmenter = build(name, context=False, unit_px=14 if "14" in name else 16)
    images, visible = masked_images(segmenter, 3, 4, k=5)
    (right,) = segmenter.encode(images, visible)

    def first_places(tokens, rotation, indices):
        return rotation[: indices.shape[1]].expand(len(tokens), -1, -1)

    monkeypatch.setattr("timm.models.eva.apply_keep_indices_nlc", first_places)
    (wrong,) = segmenter.encode(images, visible)
    assert (wrong - right).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_masked_patches_are_not_embedded(name, memory_format):
    segmenter = build(name)
    images, visible = masked_images(segmenter, 3, 4, k=5)
    images = images.contiguous(memory_format=memory_format)
    seen = []
    hook = segmenter.backbone.patch_embed.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    segmenter.encode(images, visible)
    hook.remove()
    assert seen[0].shape == (2 * 5, 3, segmenter.unit_px, segmenter.unit_px)
    mask = units.visible_pixel_mask(visible, (3, 4), segmenter.unit_px)[:, None].expand_as(images)
    torch.testing.assert_close(seen[0].sum(), images[mask].sum())


def test_levels_are_timms_own_intermediates():
    """Blocks 2, 3, 4 and 5 of 5, after the final norm."""
    for name in ("vit_tiny_patch16_224", "eva02_tiny_patch14_224"):
        segmenter = build_segmenter(f"timm/{name}", 3, head="dpt", backbone_options={**SMALL, "depth": 5}).eval()
        images = torch.randn(2, 3, 3 * segmenter.patch_px, 5 * segmenter.patch_px)
        expected = segmenter.backbone.forward_intermediates(
            images, [1, 2, 3, 4], norm=True, intermediates_only=True, output_fmt="NLC"
        )
        for level, want in zip(segmenter.encode(images), expected, strict=True):
            torch.testing.assert_close(level.flatten(2).mT, segmenter.backbone.fc_norm(want))


def test_taps_keep_nothing_after_a_call_even_one_that_fails():
    segmenter = build("vit_tiny_patch16_224")
    encoder = VitEncoder.build(segmenter.backbone, None, levels=2)
    images, visible = masked_images(segmenter, 3, 4)
    encoder.visible(images, visible, (3, 4))
    segmenter.backbone.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.visible(images, visible, (3, 4))
    (tap,) = encoder.taps
    assert tap.tokens is None
    assert not tap.open
    assert segmenter.backbone.patch_drop.mask is None


@pytest.mark.parametrize("family", VITS)
@pytest.mark.parametrize("head", ["linear", "dpt"])
@pytest.mark.parametrize("masked", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(family, head, masked):
    name, options = VITS[family]
    torch.manual_seed(0)
    # Stochastic depth: backward must draw again what forward drew.
    options = {**options, "depth": 4, "drop_path_rate": 0.5}
    plain = build_segmenter(name, 3, head=head, backbone_options=options).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.encoder.checkpoint_blocks()
    images, visible = masked_images(plain, 3, 4)

    runs = []
    checkpointed.backbone.blocks[1].register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    results = []
    for segmenter in (plain, checkpointed):
        torch.manual_seed(1)
        with set_checkpoint_early_stop(False):  # else backward may stop short of the hooks on a block
            logits = segmenter(images, visible if masked else None)
            logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for n, p in segmenter.named_parameters() if p.grad is not None)])
        assert all(tap.tokens is None for tap in segmenter.encoder.taps)
    assert len(runs) == 2  # once more in backward
    for want, have in zip(*results, strict=True):
        scale = want.abs().max().clamp_min(1)
        torch.testing.assert_close(have / scale, want / scale, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "blocks", "millions"), [("b3", 28, 44.6), ("b4", 41, 61.4), ("b5", 52, 82.0)])
def test_large_segformers(size, blocks, millions):
    with torch.device("meta"):
        segmenter = build_segmenter(f"transformers/segformer-{size}", 19, context=False)
    assert segmenter.unit_px == 32
    assert sum(len(stage.blocks) for stage in segmenter.backbone.stages) == blocks
    encoder = sum(p.numel() for p in segmenter.backbone.parameters()) / 1e6
    assert encoder == pytest.approx(millions, abs=0.7)  # the paper's column "encoder"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet50", "no ViT that can drop tokens"),
        ("convnext_tiny", "no ViT that can drop tokens"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("mobilenetv3_small_100", "no ViT that can drop tokens"),
        ("beit_base_patch16_224", "Beit"),
        ("beitv2_base_patch16_224", "Beit"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
        ("vit_small_r26_s32_224", "would leak"),
        ("vit_base_r50_s16_224", "would leak"),
        ("vit_relpos_small_patch16_224", "no ViT that can drop tokens"),  # a bias for every pair of places
        ("vitamin_small_224", "would leak"),
        ("naflexvit_base_patch16_gap", "no ViT|NaFlex"),
        ("cait_xxs24_224", "no ViT that can drop tokens"),
        ("xcit_nano_12_p16_224", "no ViT that can drop tokens"),
        ("pit_ti_224", "no ViT that can drop tokens"),
        ("hiera_tiny_224", "no ViT that can drop tokens|Hiera"),
        ("samvit_base_patch16", "."),
        ("mixer_s16_224", "no ViT that can drop tokens"),
    ],
)  # fmt: skip
def test_what_cannot_drop_tokens_is_refused(name, reason):
    with torch.device("meta"), pytest.raises(ValueError, match=f"backbone: timm/{name} .*({reason})"):
        build_segmenter(f"timm/{name}", 3)
