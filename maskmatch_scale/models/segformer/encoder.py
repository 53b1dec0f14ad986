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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import SegformerConfig, SegformerModel
from transformers.models.segformer.modeling_segformer import SegformerMixMLP

from maskmatch_scale.models.units import Grid, Halo, UnitPlan, zero_masked_pixels

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
        checkpointing: see `checkpoint_blocks`.
    """

    model: Any
    unit_px: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    checkpointing: bool = False

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
        return cls(model, check_geometry(config), tuple(config.hidden_sizes), strides)

    def checkpoint_blocks(self) -> None:
        """Keep only the inputs of blocks for backward, which runs every block again: less memory, more time.

        Outputs and gradients stay the same, with and without a mask (Chen et al., arXiv 1604.06174).
        """
        self.checkpointing = True
        for module in self.model.modules():
            if isinstance(module, UnitMixMLP):
                module.recompute = False  # its hooks would go before the checkpoint's own, and keep what that drops

    def _run(self, block: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(*arguments)
        tokens: Tensor = checkpoint(block, *arguments, use_reentrant=False)
        return tokens

    def check_size(self, height: int, width: int) -> None:
        """Any size is encoded whole (convolutions pad); masked calls check whole units themselves."""

    def full(self, images: Tensor) -> list[Tensor]:
        """Encode whole images (B, 3, H, W) with transformers' own modules: [(B, C, h, w)], one map a stage."""
        maps, hidden = [], images
        for stage in self.model.stages:
            tokens, height, width = stage.patch_embeddings(hidden)
            for block in stage.blocks:
                tokens = self._run(block, tokens, height, width)
            tokens = stage.layer_norm(tokens)
            # A view in channels-last memory: transformers copies to channels-first here, and the head back again.
            hidden = tokens.view(len(tokens), height, width, -1).permute(0, 3, 1, 2)
            maps.append(hidden)
        return maps

    def visible(self, images: Tensor, visible: Tensor, grid: Grid) -> list[Tensor]:
        """Encode visible units alone: [(B, k, r, r, C)], unit tokens of every stage; r = unit_px / stride."""
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
                tokens = self._run(_block, block, tokens, halo)
            tokens = stage.layer_norm(tokens)
            features.append(tokens.view(batch, k, r, r, -1))
        return features


class PatchConv2d(nn.Conv2d):
    """A convolution that also takes what its kernel sees, cut out already: then a matrix product.

    Called as a module, so that hooks run: ZeRO-3 gathers the weight by them, also when a checkpointed block is run
    again in backward.
    """

    def forward(self, x: Tensor, cut: bool = False) -> Tensor:
        """Convolve maps (B, C, h, w) as ever, or what was cut out of them.

        Args:
            x: maps; or, if `cut`, windows (n, C, side, side) that bring their own padding, to (n, C_out, r, r), or
                patches (n, kernel² · C), taps row-major and channels last, to (n, C_out): much faster than a
                convolution whose output is a pixel or four.
            cut: whether x was cut out.
        """
        if not cut:
            return super().forward(_with_batch_stride(x))
        if x.ndim == 2:
            return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class HaloConv2d(nn.Conv2d):
    """A depthwise convolution that also runs on unit tokens alone; a module for the reason that `PatchConv2d` gives."""

    def forward(self, x: Tensor, halo: Halo | None = None) -> Tensor:
        """Convolve maps (B, C, h, w), or unit tokens (B, k · r², C) with their neighbours by `halo`."""
        if halo is None:
            return super().forward(_with_batch_stride(x))
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        mixed: Tensor = _HaloDepthwise.apply(x.flatten(0, 1), weight, bias, halo)
        return mixed.view(x.shape)


class _HaloDepthwise(torch.autograd.Function):
    """Depthwise convolution of unit tokens (B · k · r², C), masked neighbours and the outside read as zero.

    With stride 1 and an odd kernel the gradient of the input is the same convolution of the gradient, kernel turned
    round: backward gathers with the same plan instead of scattering, sums in a fixed order, and nothing but the tokens
    is kept for it (windows are up to nine times larger).
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None, halo: Halo) -> Tensor:
        ctx.save_for_backward(tokens, weight, bias)
        ctx.halo = halo
        return _token_rows(F.conv2d(halo.windows(tokens), weight, bias, groups=len(weight)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        tokens, weight, bias = ctx.saved_tensors
        grad_tokens = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            turned = F.conv2d(ctx.halo.windows(gradient), weight.flip(2, 3), groups=len(weight))
            grad_tokens = _token_rows(turned)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            windows = ctx.halo.windows(tokens)
            side = windows.shape[2] - weight.shape[2] + 1
            outputs = gradient.view(len(windows), side, side, -1).permute(0, 3, 1, 2)
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                outputs, windows, weight, None if bias is None else [len(weight)], [1, 1], [0, 0], [1, 1],
                False, [0, 0], len(weight), [False, True, bias is not None],
            )  # fmt: skip
        return grad_tokens, grad_weight, grad_bias, None


class UnitMixMLP(SegformerMixMLP):  # type: ignore[misc]  # transformers ships no types
    """The Mix-FFN, also on unit tokens alone; one of its three wide activations is computed again in backward."""

    recompute = True

    def forward(
        self, hidden_states: Tensor, height: int | None = None, width: int | None = None, halo: Halo | None = None
    ) -> Tensor:
        """Tokens (B, n, C) of maps of height × width, or unit tokens with their neighbours by `halo`: same shape."""
        wide = self.fc1(hidden_states)
        wide = self.dwconv(wide, height, width) if halo is None else self.dwconv.dwconv(wide, halo)
        activated = self.activation_fn(wide)
        dropped = self.dropout.training and self.dropout.p
        if dropped or not self.recompute or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.dropout(self.fc2(self.dropout(activated)))  # type: ignore[no-any-return]
        with _recomputed(activated, lambda: self.activation_fn(wide)):
            return self.fc2(activated)  # type: ignore[no-any-return]


def _recomputed(tensor: Tensor, again: Callable[[], Tensor]) -> saved_tensors_hooks:
    """While this is entered, autograd keeps no copy of `tensor` but makes it `again` in backward."""
    own = tensor.data_ptr(), tensor.numel()  # not the tensor itself: autograd keeps the functions below

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if (saved.data_ptr(), saved.numel()) == own else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else again().view(packed)

    return saved_tensors_hooks(pack, unpack)


def _token_rows(windows: Tensor) -> Tensor:
    """(n, C, r, r) to (n · r², C); free in channels-last memory."""
    return windows.permute(0, 2, 3, 1).reshape(-1, windows.shape[1])


def _with_batch_stride(x: Tensor) -> Tensor:
    """The same maps; a batch of one in channels-last memory gets the batch stride that this layout has.

    transformers makes these maps by transposing tokens, which leaves a batch of one with a stride of C. It is never
    used, but oneDNN then takes the layout for none that it knows: depthwise convolutions become far slower.
    """
    if len(x) > 1 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x
    _, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).flatten().view(1, height, width, channels).permute(0, 3, 1, 2)


def _margins(conv: nn.Conv2d) -> tuple[int, int]:
    """How far a convolution reads before and after a unit; the last window starts one stride before the unit's end."""
    before = conv.padding[0]
    assert not isinstance(before, str)
    return before, max(0, conv.kernel_size[0] - before - conv.stride[0])


def _embed_pixels(conv: nn.Conv2d, images: Tensor, plan: UnitPlan, unit_px: int) -> Tensor:
    """First patch embedding of the visible units of images (B, 3, H, W), masked pixels in their halo read as zero."""
    images = zero_masked_pixels(images, plan.visible, plan.grid, unit_px)  # only the halo needs this
    before, after = _margins(conv)
    side = before + unit_px + after
    padded = F.pad(images, (before, after, before, after))
    tiles = padded.unfold(2, side, unit_px).unfold(3, side, unit_px).permute(0, 2, 3, 1, 4, 5)
    embedded: Tensor = conv(tiles[plan.image, plan.row, plan.col].flatten(0, 1), cut=True)
    return _token_rows(embedded)


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
