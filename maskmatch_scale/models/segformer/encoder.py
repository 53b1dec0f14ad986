"""SegFormer's encoder (MiT) of transformers, run on whole images or on visible units, and what it costs.

A unit spans stride × sr_ratio pixels at every stage, 32 in the official sizes. The kernel of the spatial-reduction
attention equals its stride, so one key/value cell *is* one unit: masked units leave queries, keys and values alike.
Tokens meet in two other places only: in the overlapping patch embeddings and in the 3×3 depthwise convolution of the
Mix-FFN. Both read a small margin around each unit. It is gathered by index from visible neighbours and is zero
elsewhere.

This equals the dense encoder with masked tokens set to zero at the *input* of every convolution and masked cells left
out of keys and values (`tests/models/test_segformer_reference.py`).

Paper: Xie et al., SegFormer, NeurIPS 2021, arXiv 2105.15203. Modules and names: transformers' `SegformerModel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import SegformerModel
from transformers.models.segformer.modeling_segformer import SegformerMixMLP

from maskmatch_scale.models.backbone import Encoder, Macs, allow_graphs
from maskmatch_scale.models.segformer.config import check_geometry
from maskmatch_scale.models.segformer.layers import HaloConv2d, PatchConv2d, TableLinear, UnitMixMLP, token_rows
from maskmatch_scale.models.units import Grid, Halo, UnitPlan, unit_tokens, zero_masked_pixels


@dataclass
class SegformerEncoder(Encoder):
    """Runs a `SegformerModel` on whole images, which may have any size, or on visible units.

    The parameters are read through the model's own modules.

    Attributes:
        model: transformers' encoder.
        unit_px: side of a unit, pixels.
        channels: C of every stage.
        strides: pixels a token of every stage.
        checkpointing: see `checkpoint_blocks`.
        unit_block: runs a block on unit tokens (block, tokens, halo).
    """

    model: Any
    unit_px: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    checkpointing: bool = False
    unit_block: Callable[..., Tensor] = field(default_factory=lambda: _block)
    frozen_layers: int = 0

    @classmethod
    def build(cls, config: Any) -> SegformerEncoder:
        """Build the encoder with transformers' own initialisation."""
        strides = tuple(math.prod(config.strides[: stage + 1]) for stage in range(config.num_encoder_blocks))
        model = SegformerModel(config)
        for module in model.modules():
            if type(module) is nn.Conv2d:  # the same parameters under the same names
                module.__class__ = PatchConv2d if module.groups == 1 else HaloConv2d
            elif type(module) is SegformerMixMLP:
                module.__class__ = UnitMixMLP
                module.fc1.__class__ = TableLinear
        return cls(model, check_geometry(config), tuple(config.hidden_sizes), strides)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The stages, each with its patch embedding and its norm; there is nothing else."""
        return list(self.model.stages)

    def checkpoint_blocks(self) -> None:
        """Keep only the inputs of blocks for backward, which runs every block again."""
        self.checkpointing = True
        for module in self.model.modules():
            if isinstance(module, UnitMixMLP):
                # Its own hooks would run before the checkpoint's, and keep what the checkpoint drops.
                module.recompute = False

    def compile_blocks(self) -> None:
        """Run every block through torch.compile from now on; copy the model before this call, not after it.

        A graph serves one size of images: with symbolic heights and widths torch 2.14's Inductor fails on the layout of
        the depthwise convolution. A run has few shapes: those of its crops and of the teacher's scales, and up to
        `evaluation.window_batch` numbers of windows in an evaluation, each compiled when it first comes.
        """
        blocks = [block for stage in self.model.stages for block in stage.blocks]
        allow_graphs(len(blocks))
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        self.unit_block = torch.compile(_block, dynamic=False)

    def _run(self, block: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(*arguments)
        tokens: Tensor = checkpoint(block, *arguments, use_reentrant=False)
        return tokens

    def full(self, images: Tensor) -> list[Tensor]:
        """Encode images (B, in_channels, H, W) with transformers' own modules: [(B, C, h, w)], one map a stage."""
        maps, hidden = [], images
        for stage in self.model.stages:
            tokens, height, width = stage.patch_embeddings(hidden)
            for block in stage.blocks:
                tokens = self._run(block, tokens, height, width)
            tokens = stage.layer_norm(tokens)
            # A view in channels-last memory: transformers copies to channels-first here, and the head back again.
            hidden = tokens.view(tokens.shape[0], height, width, -1).permute(0, 3, 1, 2)
            maps.append(hidden)
        return maps

    def visible(self, images: Tensor, visible: Tensor, grid: Grid) -> list[Tensor]:
        """Encode visible units alone: [(B, k, r, r, C)], unit tokens of every stage; r = unit_px / stride.

        With every unit visible both ways of running compute the same, and whole images need no halos. With fewer, whole
        images would be another function.
        """
        if visible.shape[1] == grid[0] * grid[1]:  # then `visible` is 0 … k − 1, whatever the image
            return [unit_tokens(maps, grid) for maps in self.full(images)]
        return self.by_units(images, visible, grid)

    def by_units(self, images: Tensor, visible: Tensor, grid: Grid) -> list[Tensor]:
        """What `visible` gives, always by units and halos."""
        batch, k = visible.shape
        plan = UnitPlan(visible, grid)
        features: list[Tensor] = []
        tokens = None
        for stage, stage_stride in zip(self.model.stages, self.strides):
            r = self.unit_px // stage_stride
            conv = stage.patch_embeddings.proj
            if tokens is None:
                embedded = _embed_pixels(conv, images, plan, self.unit_px)
            else:
                stride = conv.stride[0]
                halo = plan.halo(r * stride, *_margins(conv))
                embedded = conv(halo.patches(tokens, conv.kernel_size[0], stride), cut=True)
            tokens = stage.patch_embeddings.layer_norm(embedded.view(batch, k * r * r, -1))
            halo = plan.halo(r, 1, 1)
            for block in stage.blocks:
                tokens = self._run(self.unit_block, block, tokens, halo)
            tokens = stage.layer_norm(tokens)
            features.append(tokens.view(batch, k, r, r, -1))
        return features

    def macs(self, height: int, width: int, visible_units: int | None) -> Macs:
        """See `Encoder.macs`.

        Patch embeddings, queries, output projections, MLPs and depthwise convolutions are computed for each token. A
        patch embedding takes kernel² · C_in · C_out a token; products with padding are included, since the library
        computes them too. Attention takes 2 · tokens · cells · C. Spatial reduction, keys and values are computed for
        each cell of the attention, which is a unit.
        """
        embeddings, blocks = [], []
        for stage, stride in zip(self.model.stages, self.strides):
            embed = stage.patch_embeddings.proj
            height, width = _convolved(height, embed), _convolved(width, embed)
            tokens = height * width if visible_units is None else visible_units * (self.unit_px // stride) ** 2
            embeddings.append(tokens * embed.weight.numel())
            macs = 0
            for block in stage.blocks:
                attention, mlp = block.attention, block.mlp
                cells = tokens
                if attention.sequence_reduction_ratio > 1:
                    reduction = attention.sequence_reduction.sequence_reduction
                    whole = _convolved(height, reduction) * _convolved(width, reduction)
                    cells = whole if visible_units is None else visible_units
                    macs += cells * reduction.weight.numel()
                # A depthwise weight has one input channel. So its size, too, is the number of products a token takes.
                for layer in (attention.q_proj, attention.o_proj, mlp.fc1, mlp.dwconv.dwconv, mlp.fc2):
                    macs += tokens * layer.weight.numel()
                for layer in (attention.k_proj, attention.v_proj):
                    macs += cells * layer.weight.numel()
                macs += 2 * tokens * cells * attention.num_attention_heads * attention.head_dim
            blocks.append(macs)
        count = self.frozen_layers
        frozen = sum(embeddings[:count]) + sum(blocks[:count])
        first = embeddings[count : count + 1]
        return Macs(sum(first), sum(embeddings[count + 1 :]) + sum(blocks[count:]), frozen)


def _margins(conv: nn.Conv2d) -> tuple[int, int]:
    """How far a convolution reads before and after a unit; the last window starts one stride before the unit's end."""
    before = conv.padding[0]
    assert not isinstance(before, str)
    return before, max(0, conv.kernel_size[0] - before - conv.stride[0])


def _embed_pixels(conv: nn.Conv2d, images: Tensor, plan: UnitPlan, unit_px: int) -> Tensor:
    """First patch embedding of visible units of images (B, in_channels, H, W).

    Masked pixels in their halo are read as zero.
    """
    images = zero_masked_pixels(images, plan.visible, plan.grid, unit_px)  # only the halo needs this
    before, after = _margins(conv)
    side = before + unit_px + after
    padded = F.pad(images, (before, after, before, after))
    tiles = padded.unfold(2, side, unit_px).unfold(3, side, unit_px).permute(0, 2, 3, 1, 4, 5)
    embedded: Tensor = conv(tiles[plan.image, plan.row, plan.col].flatten(0, 1), cut=True)
    return token_rows(embedded)


def _block(block: Any, tokens: Tensor, halo: Halo) -> Tensor:
    """`SegformerLayer.forward` on unit tokens (B, k · r², C), dropout and stochastic depth included."""
    attended = _attention(block.attention, block.layernorm_before(tokens))
    tokens = _add_branch(tokens, block.hidden_dropout(attended), block.drop_path)
    return _add_branch(tokens, block.mlp(block.layernorm_after(tokens), halo=halo), block.drop_path)


def _add_branch(tokens: Tensor, branch: Tensor, drop_path: Any) -> Tensor:
    """Add `SegformerDropPath.forward(branch)`, from the same draws, in one pass over memory instead of three."""
    if not drop_path.training or not getattr(drop_path, "drop_prob", 0.0):
        return tokens + branch
    keep = 1 - drop_path.drop_prob
    draw = torch.rand(len(tokens), 1, 1, dtype=branch.dtype, device=branch.device)
    return torch.addcmul(tokens, branch, draw.add_(keep).floor_().div_(keep))


def _attention(attention: Any, tokens: Tensor) -> Tensor:
    """`SegformerAttention.forward`: every visible token asks the visible units, one key and value a unit."""
    batch, count, channels = tokens.shape
    cells = tokens
    if attention.sequence_reduction_ratio > 1:
        reduction = attention.sequence_reduction
        # Kernel and stride are the unit, whose tokens lie side by side: a matrix product, and nothing to gather.
        units = tokens.reshape(-1, attention.sequence_reduction_ratio**2 * channels)
        cells = reduction.layer_norm(reduction.sequence_reduction(units, cut=True).view(batch, -1, channels))

    def heads(projected: Tensor) -> Tensor:
        return projected.view(batch, -1, attention.num_attention_heads, attention.head_dim).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        heads(attention.q_proj(tokens)),
        heads(attention.k_proj(cells)),
        heads(attention.v_proj(cells)),
        dropout_p=attention.attention_dropout if attention.training else 0.0,
        scale=attention.scaling,
    )
    return attention.o_proj(mixed.transpose(1, 2).reshape(batch, count, -1))  # type: ignore[no-any-return]


def _convolved(side: int, convolution: nn.Conv2d) -> int:
    """Side of what a convolution makes of maps with this side, by torch's formula."""
    padding = convolution.padding[0]
    assert not isinstance(padding, str)
    return (side + 2 * int(padding) - convolution.kernel_size[0]) // convolution.stride[0] + 1
