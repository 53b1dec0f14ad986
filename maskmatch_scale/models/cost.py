"""Multiply–adds of an encoder, from its architecture: what a pass must cost, whatever our code makes of it.

Counted are products of matrices, attention and convolutions, one multiply–add a scalar product; nothing elementwise, no
norms, no resampling. With whole images this is the library's own forward (`tests/models/test_cost.py` counts that where
torch dispatches it, and the two are equal); with visible units it is what their tokens need, so the ratio of the two is
the speed-up that a perfect implementation of dropping would reach if all products ran at one speed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import SegformerModel

from maskmatch_scale.models.segmenter import Segmenter


class _Macs(NamedTuple):
    """Multiply–adds of a forward pass over one image."""

    first: int
    """Of the first layer, the only one whose input, the image, needs no gradient."""
    rest: int


def encoder_macs(segmenter: Segmenter, height_px: int, width_px: int, visible_units: int | None = None) -> int:
    """Multiply–adds of one image's forward pass through the backbone: no head, no context decoder.

    Only shapes are read, so that a model on the meta device will do.

    - ViT: patch embedding of visible patches; linear layers and attention, 2 · n² · C, of prefix and visible tokens.
    - SegFormer: visible tokens in patch embeddings (kernel² · C_in · C_out, taps that fall on padding included, as the
      library computes them too), queries, output projection, MLP and depthwise convolution; visible key/value cells,
      which are the units, in spatial reduction, keys and values; attention, 2 · tokens · cells · C.

    Args:
        segmenter: gives the backbone and the side of a unit.
        height_px: height of the image, pixels.
        width_px: width of the image, pixels.
        visible_units: how many units are visible; None: the library's forward on the whole image.

    Raises:
        ValueError: an image that the backbone does not take, or is not whole units; or so many units are not there.
    """
    return sum(_macs(segmenter, height_px, width_px, visible_units))


def encoder_train_macs(segmenter: Segmenter, height_px: int, width_px: int, visible_units: int | None = None) -> int:
    """Multiply–adds of one image's forward and backward pass through the backbone; arguments as for `encoder_macs`.

    Every product has two of its size in backward, one for the gradient of each factor, except that images need no
    gradient: 3 · forward − first layer. All parameters are trained; nothing is recomputed.
    """
    first, rest = _macs(segmenter, height_px, width_px, visible_units)
    return 2 * first + 3 * rest


def _macs(segmenter: Segmenter, height: int, width: int, visible_units: int | None) -> _Macs:
    if visible_units is None:
        segmenter.check_size(height, width)
    else:
        rows, cols = segmenter.unit_grid(height, width)
        if not 1 <= visible_units <= rows * cols:
            raise ValueError(f"visible_units: {visible_units} out of {rows}×{cols}; it must be 1 … {rows * cols}")
    family = _segformer if isinstance(segmenter.backbone, SegformerModel) else _vit
    return family(segmenter.backbone, height, width, segmenter.unit_px, visible_units)


def _vit(model: Any, height: int, width: int, unit_px: int, visible_units: int | None) -> _Macs:
    patch = model.patch_embed.patch_size[0]
    patches = (height // patch) * (width // patch) if visible_units is None else visible_units * (unit_px // patch) ** 2
    tokens = patches + model.num_prefix_tokens
    rest = 0
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):  # projections, gates and every kind of MLP: applied to each token
            rest += tokens * module.weight.numel()
        elif hasattr(module, "num_heads"):
            rest += 2 * tokens**2 * module.num_heads * module.head_dim
    return _Macs(patches * model.patch_embed.proj.weight.numel(), rest)


def _segformer(model: Any, height: int, width: int, unit_px: int, visible_units: int | None) -> _Macs:
    embeddings, blocks = [], 0
    stride = 1
    for stage in model.stages:
        embed = stage.patch_embeddings.proj
        height, width = _convolved(height, embed), _convolved(width, embed)
        stride *= embed.stride[0]
        tokens = height * width if visible_units is None else visible_units * (unit_px // stride) ** 2
        embeddings.append(tokens * embed.weight.numel())
        for block in stage.blocks:
            attention, mlp = block.attention, block.mlp
            cells = tokens
            if attention.sequence_reduction_ratio > 1:
                reduction = attention.sequence_reduction.sequence_reduction
                whole = _convolved(height, reduction) * _convolved(width, reduction)
                cells = whole if visible_units is None else visible_units
                blocks += cells * reduction.weight.numel()
            # A depthwise weight has one input channel, so its size, too, is the products a token takes.
            for layer in (attention.q_proj, attention.o_proj, mlp.fc1, mlp.dwconv.dwconv, mlp.fc2):
                blocks += tokens * layer.weight.numel()
            for layer in (attention.k_proj, attention.v_proj):
                blocks += cells * layer.weight.numel()
            blocks += 2 * tokens * cells * attention.num_attention_heads * attention.head_dim
    return _Macs(embeddings[0], sum(embeddings[1:]) + blocks)


def _convolved(side: int, convolution: nn.Conv2d) -> int:
    """Side of what a convolution makes of a side, by torch's formula."""
    padding = convolution.padding[0]
    assert not isinstance(padding, str)
    return (side + 2 * int(padding) - convolution.kernel_size[0]) // convolution.stride[0] + 1
