"""What is compared: a backbone at one size, as our segmenter and as the library's own model, and the ways to run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import SegformerForSemanticSegmentation, SegformerModel

from benchmarks.harness import Run
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.cost import encoder_macs, encoder_train_macs
from maskmatch_scale.models.segmenter import MaskMode
from maskmatch_scale.models.weights import to_transformers_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CLASSES = 150
"""Number of classes of the whole model, as in ADE20K; the backbone does not depend on it."""


@dataclass(frozen=True)
class Case:
    """One backbone at one size; its variants are timed against each other."""

    backbone: str
    image_size: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.backbone} {self.image_size} px, batch {self.batch}, {self.dtype}"

    def build(self, device: torch.device) -> Segmenter:
        """The segmenter with random weights, the same in every run. On the meta device: all checks, but no weights.

        Raises:
            ValueError: the backbone is unknown or the size does not fit.
        """
        torch.manual_seed(0)
        with torch.device("meta" if device.type == "meta" else "cpu"):
            segmenter = build_segmenter(self.backbone, CLASSES, image_size=self.image_size, context=False)
        segmenter.unit_grid(self.image_size, self.image_size)
        return segmenter.to(device, DTYPES[self.dtype])

    def build_library(self, segmenter: Segmenter) -> nn.Module:
        """The library's own model around the segmenter's weights, which both then share.

        timm: `create_model` with the same size; its `forward_features` is what runs. transformers: the whole
        `SegformerForSemanticSegmentation`, whose `segformer` is the encoder.
        """
        library, _, name = self.backbone.partition("/")
        first = next(segmenter.parameters())
        state = segmenter.state_dict()
        model: nn.Module
        if library == "timm":
            model = timm.create_model(name, num_classes=0, img_size=self.image_size, dynamic_img_size=True)
            state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone")}
        else:
            model = SegformerForSemanticSegmentation(segmenter.backbone.config)
            state = {to_transformers_name(key): value for key, value in state.items()}
        _, unexpected = model.to(first.device, first.dtype).load_state_dict(state, strict=False, assign=True)
        assert not unexpected, unexpected
        return model


@dataclass(frozen=True)
class Variant:
    """How the backbone sees the images."""

    mode: str  # ours | library | drop | zero
    keep: float
    visible: Tensor | None
    """int64 (batch, k); None: whole images."""

    @property
    def name(self) -> str:
        """Unique among the variants of a case."""
        return f"{self.mode} {self.keep:g}"

    def encoder(self, segmenter: Segmenter, library: nn.Module) -> Callable[[Tensor], list[Tensor]]:
        """Images (B, 3, H, W) to features."""
        if self.mode == "library":
            return library_encoder(library, segmenter)
        mode: MaskMode = "zero" if self.mode == "zero" else "drop"
        return lambda images: segmenter.encode(images, self.visible, mode)

    def gmacs(self, segmenter: Segmenter, image_size: int, kind: str) -> float:
        """10⁹ multiply–adds that an image needs in this mode, by the formula of `models/cost.py`."""
        cost = encoder_train_macs if kind == "train" else encoder_macs
        k = self.visible.shape[1] if self.mode == "drop" and self.visible is not None else None
        return cost(segmenter, image_size, image_size, k) / 1e9


def library_encoder(library: Any, segmenter: Segmenter) -> Callable[[Tensor], list[Tensor]]:
    """The library's own forward through its encoder, as maps (B, C, h, w) like those of `Segmenter.encode`."""
    if isinstance(segmenter.backbone, SegformerModel):
        # As transformers' own segmentation model calls it: the maps of all stages.
        return lambda images: list(library.segformer(images, output_hidden_states=True).hidden_states)
    patch = segmenter.patch_px

    def features(images: Tensor) -> list[Tensor]:
        # Models that pool by an average have their last norm in `fc_norm`; in others it does nothing.
        tokens = library.fc_norm(library.forward_features(images))[:, library.num_prefix_tokens :]
        size = images.shape[2] // patch, images.shape[3] // patch
        return [tokens.reshape(len(images), *size, -1).permute(0, 3, 1, 2)]

    return features


def make_pass(function: Callable[[Tensor], list[Tensor]], images: Tensor, module: nn.Module, kind: str) -> Run:
    """One forward pass without gradients, or one forward and backward pass, over images (B, 3, H, W)."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return function(images)

    # Made once: computing the gradient that a head or a loss would hand back is not part of the pass.
    gradients = [torch.randn_like(output) for output in forward()] if kind == "train" else []

    def train() -> None:
        torch.autograd.backward(function(images), gradients)
        module.zero_grad(set_to_none=True)

    return train if kind == "train" else forward
