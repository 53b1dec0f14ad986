"""timm's Vision Transformers with masked tokens dropped.

timm has a seam for it: `model.patch_drop` sits between position embedding and blocks, in `VisionTransformer` (ViT,
DeiT III, DINOv2, SigLIP …) and in `Eva` (EVA02, DINOv3 …), where the kept indices also select the rotary embedding.
The blocks then run on the visible tokens and the class and register tokens alone, as in MAE's encoder
(He et al., arXiv 2111.06377). Hooks on the patch embedding see to it that masked patches are not embedded either.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maskmatch_scale.models.units import Grid, gather_units, merge_units

_LARGEST_DEFAULT_UNIT_PX = 32


def build_vit(
    name: str, image_size: int | tuple[int, int] | None, weights: Path | bool, options: dict[str, Any]
) -> Any:
    """Create a timm model that takes any image of whole patches and gives its tokens.

    Args:
        name: a timm model name.
        image_size: side or (height, width) in pixels that the position embedding is laid out for; None: the model's.
        weights: False for timm's own random initialisation, True for timm's pretrained weights, or a local file that
            is read by timm itself (names converted, position embedding resampled, pickles refused).
        options: further keyword arguments of `timm.create_model`.

    Returns:
        A `VisionTransformer` or `Eva`; called on (B, 3, H, W) it gives (B, prefix + tokens, C), normalised.

    Raises:
        ValueError: no such model, or one whose tokens cannot be dropped.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"backbone: timm has no model {name!r}{hint}")
    arguments: dict[str, Any] = {"dynamic_img_size": True, "num_classes": 0, **options}
    if image_size is not None:
        arguments["img_size"] = image_size
    if isinstance(weights, Path):
        arguments["pretrained_cfg_overlay"] = {"file": str(weights), "custom_load": False}
    try:
        model = timm.create_model(name, pretrained=bool(weights), **arguments)
    except TypeError as error:  # only a ViT takes dynamic_img_size
        raise ValueError(
            f"backbone: timm/{name} is no ViT that can drop tokens, or backbone_options has an unknown key: {error}"
        ) from error
    _refuse_undroppable(name, model)
    # Tokens, not a pooled vector: no pooling parameters that would never see a gradient.
    model.global_pool, model.attn_pool = "", None
    model.patch_drop = KeepVisible(model.num_prefix_tokens, returns_indices=isinstance(model, Eva))
    model.patch_drop.hook(model.patch_embed)
    return model


def _refuse_undroppable(name: str, model: Any) -> None:
    """Models that would run densely, or let masked pixels leak, are refused rather than run."""
    # Subclasses (distilled DeiT) change what the forward gives.
    if type(model) not in (VisionTransformer, Eva):
        raise ValueError(
            f"backbone: timm/{name} is a {type(model).__name__}; tokens can be dropped in timm's VisionTransformer "
            "and Eva models only (vit_*, deit3_*, eva02_* …)"
        )
    embed = model.patch_embed
    if type(embed) is not PatchEmbed or embed.proj.kernel_size != embed.proj.stride:
        raise ValueError(
            f"backbone: timm/{name} embeds overlapping patches, so masked pixels would leak; use a plain ViT"
        )
    if embed.patch_size[0] != embed.patch_size[1] or embed.dynamic_img_pad:
        raise ValueError(f"backbone: timm/{name} needs square patches of {embed.patch_size} px without dynamic_img_pad")


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
    """Takes the place of timm's `PatchDropout`, and hooks into the patch embedding: only visible units are computed.

    timm adds position embeddings to tokens on their whole grid. So the patch embedding is given the visible units
    alone, what it makes of them is laid out on a grid of zeros, and behind the position embedding the visible places
    are picked again.

    It holds no parameters, so the model's state dict stays timm's. Without a mask it changes nothing. A deep copy of
    the model is hooked to its own copy of this: hooks are bound methods, which are copied with what they are bound to.
    """

    def __init__(self, num_prefix_tokens: int, returns_indices: bool) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.returns_indices = returns_indices
        self.mask: VisibleUnits | None = None

    def hook(self, patch_embed: nn.Module) -> None:
        """Have a patch embedding, which gives (B, h, w, C), compute visible units only."""
        patch_embed.register_forward_pre_hook(self._cut_units)
        patch_embed.register_forward_hook(self._lay_out)

    def _cut_units(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        """Images (B, 3, H, W) to a batch of their visible units, (B · k, 3, unit_px, unit_px)."""
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
        """Select (B, prefix + n, C) to (B, prefix + kept, C); for `Eva` also give the kept indices (B, kept)."""
        kept = None if self.mask is None else self.mask.tokens
        if kept is not None:
            prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
            patches = patches.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
            tokens = torch.cat([prefix, patches], dim=1)
        return (tokens, kept) if self.returns_indices else tokens


class Tap:
    """A forward hook that keeps what a block gives, while it is told to.

    While it is not, it keeps nothing: backward runs checkpointed blocks a second time.
    """

    def __init__(self) -> None:
        self.open = False
        self.tokens: Tensor | None = None

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], tokens: Tensor) -> None:
        """Keep tokens (B, prefix + n, C)."""
        if self.open:
            self.tokens = tokens


@dataclass
class VitEncoder:
    """Runs a timm ViT on whole images or on visible units.

    Not a module: the parameters stay in `model`, under timm's own names.

    Attributes:
        model: what `build_vit` gives.
        unit_px: side of a unit, pixels, a multiple of the patch.
        channels: (C,) a level; all levels are equally wide.
        strides: (patch,) a level, pixels a token; all levels are equally fine.
        taps: hooks on the blocks whose tokens are levels; not the last level, which is what the model gives.
    """

    model: Any
    unit_px: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    taps: tuple[Tap, ...] = ()

    @classmethod
    def build(cls, model: Any, unit_px: int | None, levels: int = 1) -> VitEncoder:
        """Wrap a model.

        Args:
            model: what `build_vit` gives.
            unit_px: side of a unit in pixels; None: the largest multiple of the patch that is at most 32 px.
            levels: of evenly spaced depths, the last block always among them: blocks 3, 6, 9 and 12 of 12 for 4.
                All pass the model's final norm, as in timm's `forward_intermediates(norm=True)`, and for models that
                pool their tokens the norm behind the pooling, which is their only one.

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
        return cls(model, unit_px, (int(model.embed_dim),) * levels, (patch,) * levels, taps)

    def checkpoint_blocks(self) -> None:
        """Keep only the inputs of blocks for backward, which runs every block again: less memory, more time.

        Activation checkpointing (Chen et al., arXiv 1604.06174) by timm's own switch. Outputs and gradients stay the
        same, with and without a mask; passes without gradients are not slowed down.
        """
        self.model.set_grad_checkpointing(True)

    def compile_blocks(self) -> None:
        """Run every block through torch.compile from now on; copy the model before, not after.

        The blocks' forwards are compiled and not the blocks: hooks, by which levels are tapped, stay outside.
        """
        # Blocks share one code, and each may have a drop path of its own, which is a graph of its own.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 8 * len(self.model.blocks))
        for block in self.model.blocks:
            block.forward = torch.compile(block.forward)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless height and width are whole patches."""
        patch = self.strides[0]
        if height % patch or width % patch:
            fits = [max(patch, round(side / patch) * patch) for side in (height, width)]
            raise ValueError(
                f"images: {height}×{width} px is not whole patches of {patch} px; resize or pad, e.g. to "
                f"{fits[0]}×{fits[1]}"
            )

    def full(self, images: Tensor) -> list[Tensor]:
        """Encode whole images (B, 3, H, W): (B, C, H / patch, W / patch) a level, in channels-last memory."""
        patch = self.strides[0]
        size = images.shape[2] // patch, images.shape[3] // patch
        return [level.reshape(len(images), *size, -1).permute(0, 3, 1, 2) for level in self._run(images, None)]

    def visible(self, images: Tensor, visible: Tensor, grid: Grid) -> list[Tensor]:
        """Encode visible units alone: (B, k, r, r, C) a level, unit tokens; r = unit_px / patch."""
        r = self.unit_px // self.strides[0]
        inner = torch.arange(r, device=visible.device)
        row = (visible // grid[1])[..., None] * r + inner  # (B, k, r)
        col = (visible % grid[1])[..., None] * r + inner
        tokens = row[..., :, None] * (grid[1] * r) + col[..., None, :]
        levels = self._run(images, VisibleUnits(visible, grid, tokens.flatten(1)))
        return [level.reshape(*visible.shape, r, r, -1) for level in levels]

    def _run(self, images: Tensor, mask: VisibleUnits | None) -> list[Tensor]:
        """Tokens (B, n, C) of every level after the final norm, prefix tokens left out."""
        self.model.patch_drop.mask = mask
        for tap in self.taps:
            tap.open = True
        try:
            # The call, not forward_features: hooks (ZeRO-3 gathers parameters by them) run on calls only.
            last: Tensor = self.model(images)
            # What the call makes of the last block's tokens; models that pool have their norm in forward_head.
            levels = [self.model.forward_head(self.model.norm(tap.tokens)) for tap in self.taps]
        finally:
            self.model.patch_drop.mask = None
            for tap in self.taps:
                tap.open, tap.tokens = False, None
        return [tokens[:, self.model.num_prefix_tokens :] for tokens in (*levels, last)]
