"""A segmenter: a library's backbone, a head, and a forward pass that computes visible units only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from maskmatch_scale.models import weights
from maskmatch_scale.models.context import ContextDecoder
from maskmatch_scale.models.heads import build_head, head_levels
from maskmatch_scale.models.segformer import SegformerEncoder, segformer_config
from maskmatch_scale.models.units import Grid, check_visible, merge_units, visible_pixel_mask, zero_masked_pixels
from maskmatch_scale.models.vit import VitEncoder, build_vit

MaskMode = Literal["drop", "zero"]
_MODES = ("drop", "zero")


class Encoder(Protocol):
    """What a family offers: its module and the two ways of running it."""

    model: Any
    unit_px: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for images that the encoder cannot take whole."""

    def checkpoint_blocks(self) -> None:
        """From now on keep only the inputs of blocks for backward."""

    def full(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) of every level."""

    def visible(self, images: Tensor, visible: Tensor, grid: Grid) -> list[Tensor]:
        """Unit tokens (B, k, r, r, C) of every level."""


class Segmenter(nn.Module):
    """Backbone, head and context decoder; built by `build_segmenter`.

    Parameters lie under `backbone.` (timm's or transformers' names), `head.`, and `context.` (training only: leave
    these out of what is exported).

    A call with `visible` never changes running statistics of BatchNorm: in training it normalises by its own batch,
    but a teacher or an export that runs on whole images is normalised by statistics of whole images.

    Attributes:
        num_classes: number of classes.
        unit_px: side of a maskable unit, pixels.
        patch_px: whole images must be whole patches of this side, pixels; 1 for SegFormer, which takes any size.
        mean: per-channel mean of RGB in 0–1 that the backbone's weights expect.
        std: per-channel standard deviation, likewise.
        backbone: the library's module.
        head: features to logits.
        context: features for masked units, or None.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Module,
        context: ContextDecoder | None,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.backbone: nn.Module = encoder.model
        self.head = head
        self.context = context
        self.num_classes = num_classes
        self.unit_px = encoder.unit_px
        self.patch_px = encoder.strides[0] if isinstance(encoder, VitEncoder) else 1
        self.mean, self.std = mean, std
        self._encoder = encoder  # no module itself: it reads `backbone`, and is copied with it by deepcopy

    def compile_blocks(self) -> None:
        """torch.compile a ViT's blocks, in place; copy the segmenter before, not after.

        Raises:
            ValueError: a SegFormer, whose blocks compute gradients of their own.
        """
        if not isinstance(self._encoder, VitEncoder):
            raise ValueError("compile: only the blocks of a ViT are compiled; leave a SegFormer as it is")
        self._encoder.compile_blocks()

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming sizes that fit, if a whole image of height × width px cannot be taken."""
        self._encoder.check_size(height, width)

    def unit_grid(self, height: int, width: int) -> Grid:
        """(rows, cols) of units of an image of height × width px.

        Raises:
            ValueError: the image is not whole units; names sizes and units that fit.
        """
        unit = self.unit_px
        if height % unit or width % unit:
            near = "×".join(str(max(unit, round(side / unit) * unit)) for side in (height, width))
            smaller = [px for px in range(unit, 0, -1) if height % px == width % px == 0 and self._unit_fits(px)]
            remedy = f", or build with unit_px={smaller[0]}" if smaller else ""
            raise ValueError(
                f"images: {height}×{width} px is not whole units of {unit} px, which masked calls need; use sides that "
                f"are multiples of {unit}, e.g. {near}{remedy}"
            )
        return height // unit, width // unit

    def _unit_fits(self, unit_px: int) -> bool:
        """Whether the backbone could be built with this unit: only a ViT leaves a choice."""
        return isinstance(self._encoder, VitEncoder) and unit_px % self._encoder.strides[0] == 0

    def encode(self, images: Tensor, visible: Tensor | None = None, mode: MaskMode = "drop") -> list[Tensor]:
        """Run the backbone alone.

        Args:
            images: float (B, 3, H, W), normalised by `mean` and `std`.
            visible: int64 (B, k), sorted indices of visible units, row-major on the unit grid; None: the whole image.
            mode: `drop` computes nothing for masked units; `zero` sets their pixels to zero and computes everything
                (the published baseline: another function, at full cost).

        Returns:
            One tensor a level, finest first: maps (B, C, h, w), or in drop mode the visible units' tokens
            (B, k, r, r, C), r = tokens a side of a unit (`units.merge_units` lays them out).

        Raises:
            ValueError: a size, mask or mode that does not fit.
        """
        if mode not in _MODES:
            raise ValueError(f"mode: {mode!r} is not one of {', '.join(_MODES)}")
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: {images.dtype} {tuple(images.shape)}; it must be float (B, 3, H, W), normalised")
        if visible is None:
            self._encoder.check_size(*images.shape[2:])
            self._check_finite(images)
            return self._encoder.full(images)
        grid = self.unit_grid(*images.shape[2:])
        check_visible(visible, len(images), grid, images.device)
        self._check_finite(images, visible)
        if mode == "zero":
            return self._encoder.full(zero_masked_pixels(images, visible, grid, self.unit_px))
        return self._encoder.visible(images, visible, grid)

    def _check_finite(self, images: Tensor, visible: Tensor | None = None) -> None:
        """Refuse NaN and infinity where they would be computed with; on the CPU only, elsewhere it would stall."""
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if bool(images.detach().sum(dtype=torch.promote_types(images.dtype, torch.float32)).isfinite()):
            return
        bad = ~images.detach().isfinite()
        if visible is not None:  # nothing of a masked unit is ever read
            bad &= visible_pixel_mask(visible, self.unit_grid(*images.shape[2:]), self.unit_px)[:, None]
        if bool(bad.any()):
            value, image = float(images.detach()[bad][0]), int(bad.nonzero()[0, 0])
            count = int(bad.sum())
            raise ValueError(f"images: {count} values are not finite, e.g. {value} in image {image} of {len(images)}")

    def forward(self, images: Tensor, visible: Tensor | None = None, mode: MaskMode = "drop") -> Tensor:
        """Predict logits, float32 (float64 for float64 weights), at the head's own resolution.

        Args:
            images: float (B, 3, H, W), normalised by `mean` and `std`.
            visible: int64 (B, k), see `encode`. In drop mode the features of masked units come from the context
                decoder; without one they are zero.
            mode: `drop` or `zero`, see `encode`.

        Returns:
            (B, num_classes, h, w); upsample bilinearly to (H, W) for a prediction a pixel.

        Raises:
            ValueError: a size, mask or mode that does not fit.
        """
        features = self.encode(images, visible, mode)
        if visible is None:
            logits: Tensor = self.head(features)
        else:
            if mode == "drop":
                features = self._complete(features, visible, self.unit_grid(*images.shape[2:]))
            with _running_statistics_kept(self.head):
                logits = self.head(features)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _complete(self, features: list[Tensor], visible: Tensor, grid: Grid) -> list[Tensor]:
        """Unit tokens of visible units to maps (B, C, h, w) of whole images."""
        others: list[Tensor] | list[None] = [None] * len(features)
        if self.context is not None and visible.shape[1] < grid[0] * grid[1]:
            others = self.context(features, visible, grid)
        return [merge_units(tokens, visible, other, grid) for tokens, other in zip(features, others)]


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """In training, batch norms inside normalise by their batch but leave their running statistics alone."""
    tracking = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def build_segmenter(
    backbone: str,
    num_classes: int,
    *,
    head: str | None = None,
    pretrained: bool | str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    unit_px: int | None = None,
    context: bool = True,
    checkpoint_activations: bool = False,
    backbone_options: dict[str, Any] | None = None,
) -> Segmenter:
    """Build a segmenter; the same weights for the same `torch.manual_seed` before the call.

    Args:
        backbone: `timm/<model name>` (VisionTransformer and Eva models), `transformers/segformer-b0` … `-b5`, or
            `transformers/<folder>` with a SegFormer `config.json`.
        num_classes: number of classes, at least 2.
        head: `segformer` (transformers' all-MLP head), `linear`, `pixel_shuffle` (classes × r² values a cell, logits
            a pixel), or `dpt` (convolutional fusion of four levels; of a ViT, features of four depths, logits at a
            quarter of the patch); None: `segformer` for SegFormer, `linear` for a ViT.
        pretrained: None or False (random), True (the library's own weights; for a folder, those in it), or a local
            file or folder: safetensors, .pth (tensors only), or a folder of transformers.
        image_size: side or (height, width) in pixels for which a ViT's position embedding is laid out; None: the
            model's own. Other sizes work too, by resampling at every call. SegFormer has no position embedding.
        unit_px: side of a maskable unit in pixels. ViT: a multiple of the patch, by default the largest that is at most
            32. SegFormer: fixed by its strides, 32 for b0–b5.
        context: whether to build the context decoder that masked passes in training predict masked positions with.
        checkpoint_activations: whether the backbone's blocks are run again in backward instead of keeping what lies
            between their inputs and outputs; the same gradients for less memory and one more forward pass.
        backbone_options: further keyword arguments of `timm.create_model` (`patch_size`, `embed_dim`, `depth`,
            `drop_path_rate` …), or keys of `SegformerConfig`.

    Raises:
        ValueError: an argument that is unknown or does not fit; names it, its value and what would fit.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: {num_classes}; at least 2 are needed")
    library, _, name = backbone.partition("/")
    options = dict(backbone_options or {})
    source = Path(pretrained) if isinstance(pretrained, str | Path) else bool(pretrained)
    own = weights.read_own(source) if isinstance(source, Path) else None

    encoder: Encoder
    if library == "timm" and name:
        library_weights = weights.find_weights(source) if isinstance(source, Path) else source
        model = build_vit(name, image_size, False if own else library_weights, options)
        head_name, hidden_size, dropout = head or "linear", 256, 0.1
        encoder = VitEncoder.build(model, unit_px, head_levels(head_name))
        mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    elif library == "transformers" and name:
        config = segformer_config(name, num_classes, options)
        encoder = SegformerEncoder.build(config)
        if unit_px is not None and unit_px != encoder.unit_px:
            raise ValueError(
                f"unit_px: {unit_px} does not fit; a unit of {backbone} is {encoder.unit_px} px, its stride × sr_ratio"
            )
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        head_name = head or "segformer"
        hidden_size, dropout = config.decoder_hidden_size, config.classifier_dropout_prob
    else:
        raise ValueError(
            f"backbone: {backbone!r} is neither timm/<model name>, transformers/segformer-b0 … -b5 nor "
            "transformers/<folder with a config.json>"
        )

    if checkpoint_activations:
        encoder.checkpoint_blocks()
    cells = [encoder.unit_px // stride for stride in encoder.strides]
    segmenter = Segmenter(
        encoder,
        build_head(head_name, encoder.channels, encoder.strides, num_classes, hidden_size, dropout),
        ContextDecoder(encoder.channels, cells) if context else None,
        num_classes,
        tuple(mean),
        tuple(std),
    )
    if source and own is None and library == "transformers":
        own = weights.segformer_weights(name if source is True else source, config)
    if own is not None:
        weights.load_own(segmenter, own, pretrained)
    return segmenter
