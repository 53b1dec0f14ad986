"""Small random segmenters of both families, in float64."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maskmatch_scale.models import Segmenter, build_segmenter

# Name, backbone options: ViT units of several patches, class and register tokens, rotary embeddings of both kinds.
VITS = {
    "vit": ("timm/vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}),
    "dinov2": ("timm/vit_small_patch14_reg4_dinov2", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "eva02": ("timm/eva02_tiny_patch14_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "dinov3": ("timm/vit_small_patch16_dinov3", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    "rope_mixed": ("timm/vit_small_patch16_rope_mixed_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
}
SEGFORMERS = {"segformer": [4, 2, 2, 2], "segformer_fine": [2, 2, 2, 2]}
FAMILIES = ["segformer", "segformer_fine", "vit", "eva02"]


@pytest.fixture
def segformer_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes the config.json of a small SegFormer."""

    def write(**overrides: object) -> Path:
        config = {
            "model_type": "segformer",
            "hidden_sizes": [8, 12, 16, 24],
            "num_attention_heads": [1, 2, 2, 3],
            "depths": [2, 1, 1, 2],
            "decoder_hidden_size": 10,
            "classifier_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
            **overrides,
        }
        folder = tmp_path / "segformer"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def build(segformer_folder: Callable[..., Path]) -> Callable[..., Segmenter]:
    """Builds a small segmenter by the name of its family, with weights and biases far from their tame start."""

    def make(family: str, classes: int = 5, **arguments: object) -> Segmenter:
        torch.manual_seed(0)
        if family in SEGFORMERS:
            folder = segformer_folder(strides=SEGFORMERS[family])
            segmenter = build_segmenter(f"transformers/{folder}", classes, **arguments)
        else:
            name, options = VITS[family]
            if arguments.get("head") == "dpt":
                options = {**options, "depth": 5}
            segmenter = build_segmenter(name, classes, backbone_options=options, **arguments)
        segmenter = segmenter.double()
        with torch.no_grad():
            for parameter in segmenter.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return segmenter

    return make
