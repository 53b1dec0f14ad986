"""How a timm model is made to compute visible units only, by a module that timm provides for and by hooks.

timm has a module between position embedding and blocks, `model.patch_drop`: in `VisionTransformer` (ViT, DeiT III,
DINOv2, SigLIP …) and in `Eva` (EVA02, DINOv3 …), where the kept indices also select the rotary embedding. Here it
selects the visible tokens. The blocks then run on these and on the class and register tokens alone, as in MAE's
encoder (He et al., arXiv 2111.06377). Hooks on the patch embedding keep masked patches from being embedded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskmatch_scale.models.units import Grid, gather_units, merge_units


@dataclass(frozen=True)
class VisibleUnits:
    """The mask of one call.

    Attributes:
        units: int64 (B, k), sorted indices of visible units.
        grid: (rows, cols) of units.
        tokens: int64 (B, k · r²), places of their tokens on the grid of patches, r × r row-major within a unit.
    """

    units: Tensor
    grid: Grid
    tokens: Tensor


class KeepVisible(nn.Module):
    """Takes the place of timm's `PatchDropout` and hooks into the patch embedding, so that only visible units are run.

    timm adds position embeddings to tokens that lie on their whole grid. So the patch embedding is given the visible
    units alone, and its tokens are laid out on a grid of zeros. After the position embedding the visible places are
    picked again.

    It holds no parameters, so the model's state dict stays timm's. Without a mask it changes nothing. A deep copy of
    the model is hooked to its own copy of this module, because hooks are bound methods, and a bound method is copied
    together with the object it is bound to.
    """

    def __init__(self, num_prefix_tokens: int, returns_indices: bool) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.returns_indices = returns_indices
        self.mask: VisibleUnits | None = None

    def hook(self, patch_embed: nn.Module) -> None:
        """Make a patch embedding, which gives (B, h, w, C), compute visible units only."""
        patch_embed.register_forward_pre_hook(self._cut_units)
        patch_embed.register_forward_hook(self._lay_out)

    def _cut_units(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        """Images (B, in_channels, H, W) to a batch of their visible units, (B · k, in_channels, unit_px, unit_px)."""
        if self.mask is None:
            return None
        units = gather_units(inputs[0].contiguous(), self.mask.units, self.mask.grid)
        return (units.flatten(0, 1).permute(0, 3, 1, 2),)

    def _lay_out(self, module: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor | None:
        """Embedded units (B · k, r, r, C) to (B, h, w, C), zero where masked."""
        if self.mask is None:
            return None
        tokens = embedded.view(*self.mask.units.shape, *embedded.shape[1:])
        return merge_units(tokens, self.mask.units, None, self.mask.grid).permute(0, 2, 3, 1)

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Select tokens: (B, prefix + n, C) to (B, prefix + kept, C); `Eva` also gets the kept indices (B, kept)."""
        kept = None if self.mask is None else self.mask.tokens
        if kept is not None:
            prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
            patches = patches.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
            tokens = torch.cat([prefix, patches], dim=1)
        return (tokens, kept) if self.returns_indices else tokens


class Tap:
    """A forward hook that keeps the tokens that a block gives, while it is open.

    It must be closed in backward, which runs checkpointed blocks a second time.
    """

    def __init__(self) -> None:
        self.open = False
        self.tokens: Tensor | None = None

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], tokens: Tensor) -> None:
        """Keep tokens (B, prefix + n, C)."""
        if self.open:
            self.tokens = tokens
