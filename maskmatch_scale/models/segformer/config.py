"""Configurations of SegFormers, and the geometry that makes their units droppable."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import SegformerConfig

# Table 6 of the paper: hidden sizes, depths, and the width of the MLP head.
OFFICIAL: dict[str, tuple[list[int], list[int], int]] = {
    "segformer-b0": ([32, 64, 160, 256], [2, 2, 2, 2], 256),
    "segformer-b1": ([64, 128, 320, 512], [2, 2, 2, 2], 256),
    "segformer-b2": ([64, 128, 320, 512], [3, 4, 6, 3], 768),
    "segformer-b3": ([64, 128, 320, 512], [3, 4, 18, 3], 768),
    "segformer-b4": ([64, 128, 320, 512], [3, 8, 27, 3], 768),
    "segformer-b5": ([64, 128, 320, 512], [3, 6, 40, 3], 768),
}


def segformer_config(name: str, num_classes: int, options: dict[str, Any], in_channels: int = 3) -> Any:
    """The `SegformerConfig` of an official size, or of a folder with a `config.json`.

    Args:
        name: `segformer-b0` … `segformer-b5`, or a folder.
        num_classes: written into the configuration as `num_labels`.
        options: keys of `SegformerConfig` to override, such as `drop_path_rate`.
        in_channels: written into it as `num_channels`, whatever a folder says.

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
    config.num_channels = in_channels
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
