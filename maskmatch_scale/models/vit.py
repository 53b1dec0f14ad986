"""timm's Vision Transformers with masked tokens dropped.

timm has a seam for it: `model.patch_drop` sits between position embedding and blocks, in `VisionTransformer` (ViT,
DeiT III, DINOv2, SigLIP …) and in `Eva` (EVA02, DINOv3 …), where the kept indices also select the rotary embedding.
The blocks then run on the visible tokens and the class and register tokens alone, as in MAE's encoder
(He et al., arXiv 2111.06377).
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

from maskmatch_scale.models.units import Grid

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


class KeepVisible(nn.Module):
    """Takes the place of timm's `PatchDropout`: keeps the prefix tokens and the tokens at `indices`.

    It holds no parameters, so the model's state dict stays timm's. Without indices it keeps everything.
    """

    def __init__(self, num_prefix_tokens: int, returns_indices: bool) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.returns_indices = returns_indices
        self.indices: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Select (B, prefix + n, C) to (B, prefix + kept, C); for `Eva` also give the kept indices (B, kept)."""
        if self.indices is not None:
            prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
            kept = patches.gather(1, self.indices[..., None].expand(-1, -1, tokens.shape[-1]))
            tokens = torch.cat([prefix, kept], dim=1)
        return (tokens, self.indices) if self.returns_indices else tokens


@dataclass
class VitEncoder:
    """Runs a timm ViT on whole images or on visible units.

    Not a module: the parameters stay in `model`, under timm's own names.

    Attributes:
        model: what `build_vit` gives.
        unit_px: side of a unit, pixels, a multiple of the patch.
        channels: (C,), one level.
        strides: (patch,), pixels a token.
    """

    model: Any
    unit_px: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def build(cls, model: Any, unit_px: int | None) -> VitEncoder:
        """Wrap a model; `unit_px` None is the largest multiple of the patch that is at most 32 px.

        Raises:
            ValueError: `unit_px` is no multiple of the patch.
        """
        patch = int(model.patch_embed.patch_size[0])
        if unit_px is None:
            unit_px = max(patch, _LARGEST_DEFAULT_UNIT_PX // patch * patch)
        if unit_px < patch or unit_px % patch:
            fits = ", ".join(str(patch * factor) for factor in (1, 2, 4))
            raise ValueError(f"unit_px: {unit_px} is not a multiple of the {patch} px patch; {fits} … fit")
        return cls(model, unit_px, (int(model.embed_dim),), (patch,))

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
        """Encode whole images (B, 3, H, W): [(B, C, H / patch, W / patch)], in channels-last memory."""
        patch = self.strides[0]
        tokens = self._run(images, None)
        size = images.shape[2] // patch, images.shape[3] // patch
        return [tokens.reshape(len(images), *size, -1).permute(0, 3, 1, 2)]

    def visible(self, images: Tensor, visible: Tensor, grid: Grid) -> list[Tensor]:
        """Encode visible units alone: [(B, k, r, r, C)], unit tokens; r = unit_px / patch."""
        r = self.unit_px // self.strides[0]
        inner = torch.arange(r, device=visible.device)
        row = (visible // grid[1])[..., None] * r + inner  # (B, k, r)
        col = (visible % grid[1])[..., None] * r + inner
        indices = row[..., :, None] * (grid[1] * r) + col[..., None, :]
        tokens = self._run(images, indices.flatten(1))
        return [tokens.reshape(*visible.shape, r, r, -1)]

    def _run(self, images: Tensor, indices: Tensor | None) -> Tensor:
        """Tokens (B, n, C) after the final norm, prefix tokens left out."""
        self.model.patch_drop.indices = indices
        try:
            # The call, not forward_features: hooks (ZeRO-3 gathers parameters by them) run on calls only.
            tokens: Tensor = self.model(images)
        finally:
            self.model.patch_drop.indices = None
        return tokens[:, self.model.num_prefix_tokens :]
