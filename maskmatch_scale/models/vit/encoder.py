"""Running a timm ViT on whole images or on visible units, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from maskmatch_scale.models.backbone import Encoder, Macs, allow_graphs
from maskmatch_scale.models.recompute import mark_cheap_outputs, recomputing
from maskmatch_scale.models.units import Grid
from maskmatch_scale.models.vit.masking import Tap, VisibleUnits

_LARGEST_DEFAULT_UNIT_PX = 32


@dataclass
class VitEncoder(Encoder):
    """Runs a timm ViT on whole images or on visible units.

    Attributes:
        model: what `create_vit` gives.
        unit_px: side of a unit, pixels, a multiple of the patch.
        channels: (C,) a level; all levels are equally wide.
        strides: (patch,) a level, pixels a token; all levels are equally fine.
        taps: hooks on the blocks whose tokens are levels. The last level has none: the model returns it.
        recomputes: whether outputs of GELU and LayerNorm are made again in the backward pass (`recompute`). Not with
            checkpointing, which keeps neither them nor their inputs, and not in compiled blocks, where the compiler
            decides what is kept.
    """

    model: Any
    unit_px: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    taps: tuple[Tap, ...] = ()
    recomputes: bool = True
    frozen_layers: int = 0

    @classmethod
    def build(cls, model: Any, unit_px: int | None, levels: int = 1) -> VitEncoder:
        """Wrap a model.

        Args:
            model: what `create_vit` gives.
            unit_px: side of a unit in pixels; None: the largest multiple of the patch that is at most 32 px.
            levels: how many depths to take features of. They are evenly spaced and end with the last block: 4 levels
                of 12 blocks are blocks 3, 6, 9 and 12. Each level passes the model's final norm, as in timm's
                `forward_intermediates(norm=True)`. Models that pool their tokens have one norm only, after the
                pooling; then each level passes that norm.

        Raises:
            ValueError: `unit_px` is no multiple of the patch, or the model has fewer blocks than `levels`.
        """
        patch = int(model.patch_embed.patch_size[0])
        if unit_px is None:
            unit_px = max(patch, _LARGEST_DEFAULT_UNIT_PX // patch * patch)
        if unit_px < patch or unit_px % patch:
            fits = ", ".join(str(patch * factor) for factor in (1, 2, 4))
            raise ValueError(f"unit_px: {unit_px} is not a multiple of the {patch} px patch; {fits} … fit")
        depth = len(model.blocks)
        if depth < levels:
            raise ValueError(f"head: it needs features of {levels} depths, but the backbone has {depth} blocks")
        taps = tuple(Tap() for _ in range(levels - 1))
        for level, tap in enumerate(taps, start=1):
            model.blocks[-(-depth * level // levels) - 1].register_forward_hook(tap)
        mark_cheap_outputs(model.blocks)
        return cls(model, unit_px, (int(model.embed_dim),) * levels, (patch,) * levels, taps)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The blocks. Patch and position embedding, class and register tokens come before the first."""
        return list(self.model.blocks)

    @property
    def after_layers(self) -> Sequence[nn.Module]:
        """The final norm, by either of timm's names, and what a call does after it."""
        names = ("norm", "fc_norm", "head_drop", "head")
        return [module for name in names if (module := getattr(self.model, name, None)) is not None]

    @property
    def patch_px(self) -> int:
        """Side of a patch, pixels."""
        return self.strides[0]

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens."""
        return int(self.model.num_prefix_tokens)

    @property
    def position_px(self) -> tuple[int, int] | None:
        """See `Encoder.position_px`."""
        if self.model.pos_embed is None:
            return None
        height, width = self.model.patch_embed.img_size
        return height, width

    def fix_size(self, height: int, width: int) -> None:
        """Resize the position embedding once, as every call does for images of another size than its own."""
        super().fix_size(height, width)
        with torch.no_grad():
            self.model.set_input_size(img_size=(height, width))
        # timm resizes it at every call, even to its own size when it is exported, unless it is told not to.
        self.model.dynamic_img_size = False
        self.model.patch_embed.flatten = True
        rope = getattr(self.model, "rope", None)
        if rope is not None:  # made for any size, a rotary embedding has none of its own
            rope.get_embed = partial(rope.get_embed, shape=list(self.model.patch_embed.grid_size))

    def unit_fits(self, unit_px: int) -> bool:
        """Whether the side is whole patches."""
        return unit_px % self.patch_px == 0

    def checkpoint_blocks(self) -> None:
        """Keep only the inputs of blocks for backward, by timm's own switch; passes without gradients lose no time."""
        self.model.set_grad_checkpointing(True)
        self.recomputes = False

    def compile_blocks(self) -> None:
        """Run every block through torch.compile from now on; copy the model before this call, not after it.

        What is compiled is each block's `forward`, not the block itself. So the hooks that
        keep levels stay outside.
        """
        allow_graphs(len(self.model.blocks))
        for block in self.model.blocks:
            block.forward = torch.compile(block.forward)
        self.recomputes = False

    def layer_ids(self) -> dict[str, int]:
        """As timm numbers layers: 0 for the embeddings, 1 … L for the L blocks, L for the final norm too."""
        ids: dict[str, int] = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        return ids

    def macs(self, height: int, width: int, visible_units: int | None) -> Macs:
        """See `Encoder.macs`. The patch embedding is computed for patches, all layers of blocks for prefix tokens too.

        Attention takes 2 · n² · C for n tokens.
        """
        patch = self.patch_px
        patches = (height // patch) * (width // patch)
        if visible_units is not None:
            patches = visible_units * (self.unit_px // patch) ** 2
        tokens = patches + self.prefix_tokens
        first = patches * self.model.patch_embed.proj.weight.numel()
        blocks = [_block_macs(block, tokens) for block in self.model.blocks]
        if self.frozen_layers:  # the next block's norm wants a gradient of what it gives to the first product
            frozen, rest = blocks[: self.frozen_layers], blocks[self.frozen_layers :]
            return Macs(0, sum(rest), first + sum(frozen))
        return Macs(first, sum(blocks))

    def full(self, images: Tensor) -> list[Tensor]:
        """Encode whole images (B, in_channels, H, W): (B, C, H / patch, W / patch) a level, in channels-last memory."""
        patch = self.patch_px
        size = images.shape[2] // patch, images.shape[3] // patch
        return [level.reshape(images.shape[0], *size, -1).permute(0, 3, 1, 2) for level in self._run(images, None)]

    def visible(self, images: Tensor, visible: Tensor, grid: Grid) -> list[Tensor]:
        """Encode visible units alone: unit tokens (B, k, r, r, C) a level, r = unit_px / patch."""
        r = self.unit_px // self.patch_px
        inner = torch.arange(r, device=visible.device)
        row = (visible // grid[1])[..., None] * r + inner  # (B, k, r)
        col = (visible % grid[1])[..., None] * r + inner
        tokens = row[..., :, None] * (grid[1] * r) + col[..., None, :]
        levels = self._run(images, VisibleUnits(visible, grid, tokens.flatten(1)))
        return [level.reshape(*visible.shape, r, r, -1) for level in levels]

    def _run(self, images: Tensor, mask: VisibleUnits | None) -> list[Tensor]:
        """Tokens (B, n, C) of every level after the final norm, without prefix tokens."""
        self.model.patch_drop.mask = mask
        for tap in self.taps:
            tap.open = True
        try:
            # A call, not forward_features: ZeRO-3 gathers parameters by hooks, and hooks run on calls only.
            with recomputing() if self.recomputes and torch.is_grad_enabled() else nullcontext():
                last: Tensor = self.model(images)
            # The same as the call does with the last block's tokens. Models that pool have their norm in forward_head.
            levels = [self.model.forward_head(self.model.norm(tap.tokens)) for tap in self.taps]
        finally:
            self.model.patch_drop.mask = None
            for tap in self.taps:
                tap.open, tap.tokens = False, None
        return [tokens[:, self.model.num_prefix_tokens :] for tokens in (*levels, last)]


def _block_macs(block: Any, tokens: int) -> int:
    macs = 0
    for module in block.modules():
        if isinstance(module, nn.Linear):  # projections, gates and every kind of MLP: applied to each token
            macs += tokens * module.weight.numel()
        elif hasattr(module, "num_heads"):
            macs += 2 * tokens**2 * module.num_heads * module.head_dim
    return macs
