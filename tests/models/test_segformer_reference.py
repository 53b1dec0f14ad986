"""Dropping units of a SegFormer equals a dense reference, written here from transformers' modules alone.

The reference computes every token, sets masked tokens to zero at the *input* of every convolution, and leaves masked
cells out of keys and values. Our package gives the model and the numbers to compare, nothing else.
"""

import pytest
import torch
from torch import Tensor
from transformers import SegformerForSemanticSegmentation

STRIDES = ["segformer", "segformer_fine"]


def dense_reference(model: SegformerForSemanticSegmentation, images: Tensor, unit_mask: Tensor) -> list[Tensor]:
    """Features (B, C, h, w) of every stage; unit_mask bool (B, rows, cols), true where visible."""

    def at(height: int, width: int) -> Tensor:
        tall = unit_mask.repeat_interleave(height // unit_mask.shape[1], 1)
        return tall.repeat_interleave(width // unit_mask.shape[2], 2).to(images.dtype)[:, None]

    blocked = torch.zeros(unit_mask.flatten(1).shape, dtype=images.dtype)
    blocked = blocked.masked_fill(~unit_mask.flatten(1), -torch.inf)[:, None, None, :]
    hidden, features = images, []
    for stage in model.segformer.stages:
        tokens, height, width = stage.patch_embeddings(hidden * at(*hidden.shape[2:]))
        mask = at(height, width).flatten(2).transpose(1, 2)
        for block in stage.blocks:
            normed = block.layernorm_before(tokens) * mask
            tokens = tokens + block.attention(normed, height, width, attention_mask=blocked)[0]
            inner = block.mlp.fc1(block.layernorm_after(tokens)) * mask
            inner = block.mlp.activation_fn(block.mlp.dwconv(inner, height, width))
            tokens = tokens + block.mlp.fc2(inner)
        tokens = stage.layer_norm(tokens)
        hidden = tokens.transpose(1, 2).unflatten(2, (height, width))
        features.append(hidden * at(height, width))
    return features


def masks(batch: int, rows: int, cols: int, k: int) -> tuple[Tensor, Tensor]:
    """Another mask for every image: indices (B, k) and bool (B, rows, cols)."""
    visible = torch.stack([torch.randperm(rows * cols)[:k].sort().values for _ in range(batch)])
    mask = torch.zeros(batch, rows * cols, dtype=torch.bool)
    for row, indices in zip(mask, visible):
        row[indices] = True
    return visible, mask.view(batch, rows, cols)


def twin(segmenter: torch.nn.Module) -> SegformerForSemanticSegmentation:
    """The model of transformers itself, with the segmenter's weights."""
    config = segmenter.backbone.config
    config.num_labels = segmenter.num_classes
    model = SegformerForSemanticSegmentation(config).double()
    ours = {k: v for k, v in segmenter.state_dict().items() if not k.startswith("context.")}
    rename = {k: k.replace("backbone.", "segformer.", 1).replace("head.", "decode_head.", 1) for k in ours}
    model.load_state_dict({rename[k]: v for k, v in ours.items()}, strict=True)
    return model.train(segmenter.training)


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = {k: p.grad for k, p in theirs.named_parameters()}
    checked = 0
    for name, parameter in ours.named_parameters():
        gradient = expected[name.replace("backbone.", "segformer.", 1).replace("head.", "decode_head.", 1)]
        if gradient is None:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        scale = gradient.abs().max().clamp_min(1)
        torch.testing.assert_close(parameter.grad / scale, gradient / scale, rtol=0, atol=1e-11, msg=name)
        checked += 1
    assert checked > 50


@pytest.mark.parametrize("family", STRIDES)
@pytest.mark.parametrize(("k", "channels"), [(1, 3), (5, 3), (11, 3), (5, 1), (5, 5)])
def test_every_stage_and_every_gradient_equal_the_dense_reference(build, family, k, channels):
    segmenter = build(family, context=False, in_channels=channels).eval()
    reference = twin(segmenter)
    unit = segmenter.unit_px
    images = torch.randn(3, channels, 4 * unit, 3 * unit, dtype=torch.float64)
    visible, mask = masks(3, 4, 3, k)

    expected = dense_reference(reference, images, mask)
    features = segmenter.encode(images, visible)
    loss = expected_loss = torch.zeros((), dtype=torch.float64)
    for level, dense in zip(features, expected):
        r = level.shape[2]
        for b in range(3):
            for j, index in enumerate(visible[b].tolist()):
                y, x = index // 3 * r, index % 3 * r
                want = dense[b, :, y : y + r, x : x + r].permute(1, 2, 0)
                torch.testing.assert_close(level[b, j], want, rtol=0, atol=1e-12)
                weight = torch.randn_like(want)
                loss = loss + (level[b, j] * weight).sum()
                expected_loss = expected_loss + (want * weight).sum()
    loss.backward()
    expected_loss.backward()
    assert_same_gradients(segmenter, reference)


@pytest.mark.parametrize("family", STRIDES)
@pytest.mark.parametrize("training", [False, True])
def test_logits_equal_the_published_head_on_the_reference(build, family, training):
    """Without context decoder, features of masked units are zero; BatchNorm takes its batch in training."""
    segmenter = build(family, context=False).train(training)
    reference = twin(segmenter)
    unit = segmenter.unit_px
    images = torch.randn(2, 3, 2 * unit, 5 * unit, dtype=torch.float64)
    visible, mask = masks(2, 2, 5, 4)

    logits = segmenter(images, visible)
    expected = reference.decode_head(dense_reference(reference, images, mask))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_same_gradients(segmenter, reference)


@pytest.mark.parametrize("family", STRIDES)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_full_forward_is_transformers_own(build, family, channels):
    segmenter = build(family, in_channels=channels).eval()
    reference = twin(segmenter)
    images = torch.randn(2, channels, 70, 101, dtype=torch.float64)  # no whole units needed
    torch.testing.assert_close(segmenter(images), reference(images).logits, rtol=0, atol=1e-12)


def test_wide_patches_and_few_stages(segformer_folder):
    """Halos are general: kernels wider than their stride reach further, stride-1 and 1×1 embeddings not at all."""
    from maskmatch_scale.models import build_segmenter

    folder = segformer_folder(
        num_encoder_blocks=3, hidden_sizes=[8, 12, 16], num_attention_heads=[1, 2, 2], depths=[1, 1, 1],
        mlp_ratios=[2, 2, 2], strides=[2, 4, 1], sr_ratios=[4, 1, 1], patch_sizes=[1, 7, 5],
    )  # fmt: skip
    segmenter = build_segmenter(f"transformers/{folder}", 3, context=False).double().eval()
    assert segmenter.unit_px == 8
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    visible, mask = masks(2, 5, 3, 8)
    expected = twin(segmenter).decode_head(dense_reference(twin(segmenter), images, mask))
    torch.testing.assert_close(segmenter(images, visible), expected, rtol=0, atol=1e-12)
