"""Dropping tokens of a ViT equals attention that is masked, written here from timm's modules alone."""

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from .conftest import VITS


def masked_reference(model: torch.nn.Module, images: Tensor, patch_mask: Tensor) -> Tensor:
    """Tokens (B, n, C): every token computed, masked ones left out of keys and values."""
    prefix = model.num_prefix_tokens
    seen = torch.cat([patch_mask.new_ones(len(images), prefix), patch_mask.flatten(1)], dim=1)
    embedded = model._pos_embed(model.patch_embed(images))
    tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    tokens = model.norm_pre(tokens)
    for depth, block in enumerate(model.blocks):
        extra = {} if rope is None else {"rope": rope[depth] if getattr(model, "rope_mixed", False) else rope}
        tokens = block(tokens, attn_mask=seen[:, None, None, :], **extra)
    return model.fc_norm(model.norm(tokens))[:, prefix:]


@pytest.mark.parametrize("family", VITS)
@pytest.mark.parametrize(("patches_a_unit", "channels"), [(1, 3), (2, 3), (2, 1), (2, 5)])
def test_tokens_and_every_gradient_equal_masked_attention(build, family, patches_a_unit, channels):
    name, options = VITS[family]
    patch = timm.create_model(name.removeprefix("timm/"), **options).patch_embed.patch_size[0]
    unit = patch * patches_a_unit
    segmenter = build(family, context=False, unit_px=unit, in_channels=channels).eval()
    options = {**options, "num_classes": 0, "dynamic_img_size": True, "in_chans": channels}
    reference = timm.create_model(name.removeprefix("timm/"), **options)
    reference = reference.double().eval()
    reference.load_state_dict(segmenter.backbone.state_dict(), strict=True)  # timm's names, all of them

    rows, cols, k = 3, 4, 5
    images = torch.randn(2, channels, rows * unit, cols * unit, dtype=torch.float64)
    visible = torch.stack([torch.randperm(rows * cols)[:k].sort().values for _ in range(2)])
    mask = torch.zeros(2, rows * patches_a_unit, cols * patches_a_unit, dtype=torch.bool)
    for b in range(2):
        for index in visible[b].tolist():
            y, x = index // cols * patches_a_unit, index % cols * patches_a_unit
            mask[b, y : y + patches_a_unit, x : x + patches_a_unit] = True

    (features,) = segmenter.encode(images, visible)
    expected = masked_reference(reference, images, mask).unflatten(1, mask.shape[1:])
    loss = expected_loss = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for j, index in enumerate(visible[b].tolist()):
            y, x = index // cols * patches_a_unit, index % cols * patches_a_unit
            want = expected[b, y : y + patches_a_unit, x : x + patches_a_unit]
            torch.testing.assert_close(features[b, j], want, rtol=0, atol=1e-12)
            weight = torch.randn_like(want)
            loss = loss + (features[b, j] * weight).sum()
            expected_loss = expected_loss + (want * weight).sum()
    loss.backward()
    expected_loss.backward()
    gradients = dict(reference.named_parameters())
    for parameter_name, parameter in segmenter.backbone.named_parameters():
        want = gradients[parameter_name].grad
        scale = want.abs().max().clamp_min(1)
        torch.testing.assert_close(parameter.grad / scale, want / scale, rtol=0, atol=1e-11, msg=parameter_name)


@pytest.mark.parametrize("family", ["vit", "dinov2", "eva02"])
@pytest.mark.parametrize("masked", [False, True])
def test_other_sizes_see_the_embedding_resized(build, family, masked):
    """As a model does that is laid out for the size, with the first one's embedding, resized by timm's function."""
    segmenter = build(family, context=False).eval()
    size = 3 * segmenter.unit_px, 4 * segmenter.unit_px
    laid_out = build(family, context=False, image_size=size).eval()
    own, state = segmenter.backbone, segmenter.state_dict()
    grid = laid_out.backbone.patch_embed.grid_size
    assert grid != own.patch_embed.grid_size
    prefix = 0 if own.no_embed_class else own.num_prefix_tokens
    state["backbone.pos_embed"] = resample_abs_pos_embed(own.pos_embed, list(grid), num_prefix_tokens=prefix)
    laid_out.load_state_dict(state)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    visible = torch.tensor([[0, 3, 7], [1, 2, 11]]) if masked else None
    for one, other in zip(segmenter.encode(images, visible), laid_out.encode(images, visible), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", VITS)
def test_full_forward_is_timms_own(build, family):
    name, options = VITS[family]
    segmenter = build(family).eval()
    reference = timm.create_model(name.removeprefix("timm/"), num_classes=0, dynamic_img_size=True, **options)
    reference = reference.double().eval()
    reference.load_state_dict(segmenter.backbone.state_dict(), strict=True)
    patch = reference.patch_embed.patch_size[0]
    images = torch.randn(2, 3, 3 * patch, 5 * patch, dtype=torch.float64)
    tokens = reference.fc_norm(reference.forward_features(images))[:, reference.num_prefix_tokens :]
    (features,) = segmenter.encode(images)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens, rtol=0, atol=1e-13)
