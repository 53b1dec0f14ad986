"""The context decoder: features for masked positions, predicted from the visible ones. Training only.

Neither SegFormer's head nor a ViT's linear head mixes positions, so they alone could predict nothing at a masked one.
This small decoder stands between encoder and head in masked passes. Every unit is one token on the coarse unit grid: a
linear summary of its features where it is visible, a mask token where it is not, both with their position. A few
narrow transformer blocks mix the tokens, and a linear layer expands every masked token to all the features of its
unit, at every level that the head reads. Visible features are not changed, so with all units visible the result is
that of the full forward pass.

It follows MAE's decoder (He et al., arXiv 2111.06377). It is narrow and shallow, since the encoder should do the work.

Decision: docs/decisions/0012-context-decoder-on-units.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskmatch_scale.models.units import Grid, masked_units

_HEAD_WIDTH = 32


class ContextDecoder(nn.Module):
    """Writes features at masked units.

    Args:
        channels: C of every level.
        cells: r of every level, tokens a side of a unit.
        depth: transformer blocks.
    """

    def __init__(self, channels: Sequence[int], cells: Sequence[int], depth: int = 2) -> None:
        super().__init__()
        # A quarter of the deepest features, in whole heads: 64 for SegFormer-b0, 128 for b1–b5, 96 for ViT-S.
        width = min(256, max(64, channels[-1] // 4 // _HEAD_WIDTH * _HEAD_WIDTH))
        self.cells = tuple(cells)
        sizes = [c * r * r for c, r in zip(channels, cells)]
        self.summarise = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.expand = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, features: Sequence[Tensor], visible: Tensor, grid: Grid) -> list[Tensor]:
        """Predict the masked units' features from the visible ones.

        Args:
            features: unit tokens (B, k, r, r, C) of every level.
            visible: int64 (B, k), sorted indices of the visible units.
            grid: (rows, cols) of units, of any size.

        Returns:
            (B, rows · cols − k, r, r, C) of every level, in the order of `units.masked_units`.
        """
        batch, k = visible.shape
        summary = torch.stack([layer(level.flatten(2)) for layer, level in zip(self.summarise, features)]).sum(0)
        position = sincos_position(grid, self.mask_token)
        # Attention does not depend on the order of tokens, and each carries its position. Visible ones come first.
        tokens = torch.cat(
            [summary + position[visible], self.mask_token + position[masked_units(visible, grid)]], dim=1
        )
        for block in self.blocks:
            tokens = block(tokens)
        masked = self.norm(tokens[:, k:])
        return [layer(masked).view(batch, masked.shape[1], r, r, -1) for layer, r in zip(self.expand, self.cells)]


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // _HEAD_WIDTH
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        qkv = self.qkv(self.norm_attention(tokens)).view(batch, count, 3, self.heads, _HEAD_WIDTH)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, width)
        tokens = tokens + self.project(mixed)
        hidden: Tensor = self.mlp(self.norm_mlp(tokens))
        return tokens + hidden


def sincos_position(grid: Grid, like: Tensor) -> Tensor:
    """Fixed sine–cosine position of every unit, (rows · cols, width), with dtype and device of `like` (width,).

    Wavelengths run from 2π to 2π · 100 units, so units are told apart in images of a few and of a few hundred units.
    """
    quarter = like.shape[0] // 4
    frequency = 100.0 ** (-torch.arange(quarter, device=like.device, dtype=torch.float64) / quarter)
    row, col = (torch.arange(n, device=like.device, dtype=torch.float64)[:, None] * frequency for n in grid)
    row, col = row[:, None].expand(*grid, -1), col[None].expand(*grid, -1)
    return torch.cat([row.sin(), row.cos(), col.sin(), col.cos()], dim=-1).flatten(0, 1).to(like.dtype)
