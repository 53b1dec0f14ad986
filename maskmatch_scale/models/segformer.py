"""SegFormer's encoder (MiT) of transformers, with masked units dropped exactly.

A unit spans stride × sr_ratio pixels at every stage, 32 in the official sizes. Then one key/value cell of the
spatial-reduction attention *is* one unit (its kernel equals its stride), so masked units leave queries, keys and values
alike; and the only other places where tokens meet, the overlapping patch embeddings and the 3×3 depthwise convolution
of the Mix-FFN, read a small halo that is gathered by index from visible neighbours and is zero elsewhere.
This equals the dense encoder with masked tokens zeroed at the *input* of every convolution and masked cells left out
of keys and values (`tests/models/test_segformer_reference.py`).

Paper: Xie et al., SegFormer, NeurIPS 2021, arXiv 2105.15203. Modules and names: transformers' `SegformerModel`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerConfig, SegformerModel

from maskmatch_scale.models.units import Grid, Halo, zero_masked_pixels

# Table 6 of the paper: hidden sizes, depths, and the width of the MLP head.
OFFICIAL: dict[str, tuple[list[int], list[int], int]] = {
    "segformer-b0": ([32, 64, 160, 256], [2, 2, 2, 2], 256),
    "segformer-b1": ([64, 128, 320, 512], [2, 2, 2, 2], 256),
    "segformer-b2": ([64, 128, 320, 512], [3, 4, 6, 3], 768),
    "segformer-b3": ([64, 128, 320, 512], [3, 4, 18, 3], 768),
    "segformer-b4": ([64, 128, 320, 512], [3, 8, 27, 3], 768),
    "segformer-b5": ([64, 128, 320, 512], [3, 6, 40, 3], 768),
}


def segformer_config(name: str, num_classes: int, options: dict[str, Any]) -> Any:
    """The `SegformerConfig` of an official size, or of a folder with a `config.json`.

    Args:
        name: `segformer-b0` … `segformer-b5`, or a folder.
        num_classes: written into the configuration as `num_labels`.
        options: keys of `SegformerConfig` to override, such as `drop_path_rate`.

    Raises:
        ValueError: no such size or folder, an unknown option, or a geometry whose units cannot be dropped exactly.
    """
    if name in OFFICIAL:
        hidden_sizes, depths, decoder_hidden_size = OFFICIAL[name]
        config = SegformerConfig(
            hidden_sizes=hidden_sizes, depths=depths, decoder_hidden_size=decoder_hidden_size, num_labels=num_classes
        )
    elif (Path(name) / "config.json").is_file():
        config = SegformerConfig.from_pretrained(name, num_labels=num_classes)
    else:
        raise ValueError(
            f"backbone: 'transformers/{name}' is neither one of {', '.join(OFFICIAL)} nor a folder with a config.json"
        )
    for key, value in options.items():
        if not hasattr(config, key):
            raise ValueError(f"backbone_options: {key!r} is not a key of transformers' SegformerConfig")
        setattr(config, key, value)
    check_geometry(config)
    return config


def check_geometry(config: Any) -> int:
    """The side of a unit in pixels, equal at every stage.

    Raises:
        ValueError: units differ between stages, or a patch size is even (transformers then makes one row too many).
    """
    strides = [math.prod(config.strides[: stage + 1]) for stage in range(config.num_encoder_blocks)]
    units: list[int] = [stride * ratio for stride, ratio in zip(strides, config.sr_ratios)]
    if len(set(units)) != 1:
        fits = [max(units) // stride for stride in strides]
        raise ValueError(
            f"backbone: strides {list(config.strides)}, sr_ratios {list(config.sr_ratios)} make units of {units} px; "
            f"masking needs one size at every stage, e.g. sr_ratios {fits}"
        )
    if any(size % 2 == 0 for size in config.patch_sizes):
        raise ValueError(f"backbone: patch_sizes {list(config.patch_sizes)} must be odd, e.g. [7, 3, 3, 3]")
    return units[0]


@dataclass
class SegformerEncoder:
    """Runs a `SegformerModel` on whole images or on visible units.

    Not a module: the parameters stay in `model`, under transformers' own names, and are read through its modules.

    Attributes:
        model: transformers' encoder.
        unit_px: side of a unit, pixels.
        channels: C of every stage.
        strides: pixels a token of every stage.
    """

    model: Any
    unit_px: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def build(cls, config: Any) -> SegformerEncoder:
        """Build the encoder with transformers' own initialisation."""
        strides = tuple(math.prod(config.strides[: stage + 1]) for stage in range(config.num_encoder_blocks))
        return cls(SegformerModel(config), check_geometry(config), tuple(config.hidden_sizes), strides)

    def check_size(self, height: int, width: int) -> None:
        """Any size is encoded whole (convolutions pad); masked calls check whole units themselves."""

    def full(self, images: Tensor) -> list[Tensor]:
        """Encode whole images (B, 3, H, W) with transformers' own modules: [(B, C, h, w)], one map a stage."""
        maps, hidden = [], images
        for stage in self.model.stages:
            tokens, height, width = stage.patch_embeddings(hidden)
            for block in stage.blocks:
                tokens = block(tokens, height, width)
            tokens = stage.layer_norm(tokens)
            # A view in channels-last memory: transformers copies to channels-first here, and the head back again.
            hidden = tokens.view(len(tokens), height, width, -1).permute(0, 3, 1, 2)
            maps.append(hidden)
        return maps

    def visible(self, images: Tensor, visible: Tensor, grid: Grid) -> list[Tensor]:
        """Encode visible units alone: [(B, k, r, r, C)], unit tokens of every stage; r = unit_px / stride."""
        batch, k = visible.shape
        images = zero_masked_pixels(images, visible, grid, self.unit_px)  # only its halo pixels need this
        features: list[Tensor] = []
        tokens, before_r = None, self.unit_px
        for stage, stride in zip(self.model.stages, self.strides):
            r = self.unit_px // stride
            conv = stage.patch_embeddings.proj
            step, before = conv.stride[0], conv.padding[0]
            # The last window starts one stride before the unit's end, so less halo is needed there than before.
            after = max(0, conv.kernel_size[0] - before - step)
            if tokens is None:
                windows = _pixel_windows(images, visible, grid, self.unit_px, before, after)
            else:
                windows = Halo.build(visible, grid, before_r, before, after).windows(tokens)
            embedded = F.conv2d(windows, conv.weight, conv.bias, stride=step)  # (B · k, C, r, r)
            tokens = stage.patch_embeddings.layer_norm(_tokens(embedded, batch))
            halo = Halo.build(visible, grid, r, 1, 1)
            for block in stage.blocks:
                tokens = _block(block, tokens, r, halo)
            tokens = stage.layer_norm(tokens)
            features.append(tokens.view(batch, k, r, r, -1))
            before_r = r
        return features


def _tokens(windows: Tensor, batch: int) -> Tensor:
    """(B · k, C, r, r) to (B, k · r², C); free in channels-last memory."""
    return windows.permute(0, 2, 3, 1).reshape(batch, -1, windows.shape[1])


def _pixel_windows(images: Tensor, visible: Tensor, grid: Grid, unit_px: int, before: int, after: int) -> Tensor:
    """Visible units of zero-masked images with their halo of pixels: (B · k, 3, side, side)."""
    side = before + unit_px + after
    padded = F.pad(images, (before, after, before, after))
    tiles = padded.unfold(2, side, unit_px).unfold(3, side, unit_px).permute(0, 2, 3, 1, 4, 5)
    image = torch.arange(len(images), device=visible.device)[:, None]
    return tiles[image, visible // grid[1], visible % grid[1]].flatten(0, 1)


def _block(block: Any, tokens: Tensor, r: int, halo: Halo) -> Tensor:
    """`SegformerLayer.forward` on unit tokens (B, k · r², C), dropout and stochastic depth included."""
    attended = _attention(block.attention, block.layernorm_before(tokens), r)
    tokens = block.drop_path(block.hidden_dropout(attended)) + tokens
    mixed: Tensor = block.drop_path(_mix_mlp(block.mlp, block.layernorm_after(tokens), halo))
    return mixed + tokens


def _attention(attention: Any, tokens: Tensor, r: int) -> Tensor:
    """`SegformerAttention.forward`: every visible token asks the visible units, one key and value a unit."""
    batch, count, channels = tokens.shape
    cells = tokens
    if attention.sequence_reduction_ratio > 1:
        reduction = attention.sequence_reduction
        units = tokens.view(-1, r, r, channels).permute(0, 3, 1, 2)
        cells = reduction.layer_norm(_tokens(reduction.sequence_reduction(units), batch))

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


def _mix_mlp(mlp: Any, tokens: Tensor, halo: Halo) -> Tensor:
    """`SegformerMixMLP.forward`, the depthwise convolution running on windows that bring their own padding."""
    conv = mlp.dwconv.dwconv
    windows = halo.windows(mlp.fc1(tokens))
    mixed = F.conv2d(windows, conv.weight, conv.bias, groups=conv.groups)
    hidden = mlp.dropout(mlp.activation_fn(_tokens(mixed, len(tokens))))
    return mlp.dropout(mlp.fc2(hidden))  # type: ignore[no-any-return]
