"""Looks up what this machine has, and what a backbone would cost, within seconds and before a run.

Models are built on the meta device, without memory for their weights, so a large one takes no longer than a small one.
timm and transformers take seconds to import, and may be missing on the machine. Only `examine` needs them, so
`maskmatch_scale.models`, which imports both, is imported there and not at the top.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from typing import TYPE_CHECKING, Any

import torch

from maskmatch_scale.errors import UserError
from maskmatch_scale.hosts.facts import version_of

if TYPE_CHECKING:
    from maskmatch_scale.models import Segmenter

DEFAULT_IMAGE_SIZE = 512
"""Pixels; rounded to whole units of the backbone."""

_PACKAGES = ("torchvision", "timm", "transformers", "deepspeed", "webdataset", "safetensors")


def describe_machine() -> dict[str, str]:
    """The hardware and software that a run depends on, by name. Nothing is compiled, and nothing runs on a GPU."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    ninja = shutil.which("ninja") or importlib.util.find_spec("ninja")
    asked = os.environ.get("OMP_NUM_THREADS")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "GPU": _describe_gpus(),
        "CPU kernels": torch.backends.cpu.get_cpu_capability(),
        "cores": f"{usable} usable of {os.cpu_count()}",
        "threads of torch": f"{torch.get_num_threads()} (OMP_NUM_THREADS {asked or 'not set'})",
        "between ranks": _describe_backends(),
        **{name: version_of(name) for name in _PACKAGES},
        "C++ compiler": compiler or "none: DeepSpeed cannot build its own operators",
        "CUDA compiler": "nvcc" if shutil.which("nvcc") else "none",
        "ninja": "found" if ninja else "none: DeepSpeed cannot build its own operators",
    }


def _describe_gpus() -> str:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return f"none found (torch is {built}); runs use the CPU"
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    kinds = ", ".join(f"{found.count(name)} × {name}" for name in dict.fromkeys(found))
    bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
    return f"{kinds}; CUDA {torch.version.cuda}, {bfloat16}"


def _describe_backends() -> str:
    if not torch.distributed.is_available():
        return "none: this torch has no torch.distributed"
    names = {"nccl": torch.distributed.is_nccl_available(), "gloo": torch.distributed.is_gloo_available()}
    return ", ".join(name for name, there in names.items() if there) or "neither nccl nor gloo"


def examine(backbone: str, image_size: int | None = None, keep: float = 0.3) -> dict[str, Any]:
    """Find out whether a backbone is supported, and what a forward pass of an image costs, whole and masked.

    Args:
        backbone: as for `build_segmenter`.
        image_size: side of a square image, pixels; None: 512, rounded to whole units.
        keep: share of visible units, in (0, 1].

    Returns:
        `backbone`, `supported` (True), `family`, `unit_px`, `strides` (side of a token in px, for each level),
        `image_size` (px), `rounded_from` (px, or None), `units`, `visible_units`, `tokens` (of an image, for each
        level), `prefix_tokens`, `parameters_m` (10⁶, of the backbone), `keep`. For one image and a forward pass:
        `gmacs_full`, `gmacs_keep`, `ideal_speedup`; for forward and backward the same names with `_train`.

    Raises:
        UserError: the backbone is unknown or its tokens cannot be dropped; the size or keep ratio does not fit.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size {image_size}: it must be at least 1 px")
    from maskmatch_scale.models.cost import encoder_macs, encoder_train_macs
    from maskmatch_scale.models.units import visible_count

    rounded_from = None
    side = image_size
    try:
        segmenter = _build(backbone)
        if side is None:
            side = _whole_units(DEFAULT_IMAGE_SIZE, segmenter.unit_px)
            rounded_from = None if side == DEFAULT_IMAGE_SIZE else DEFAULT_IMAGE_SIZE
        rows, cols = segmenter.unit_grid(side, side)
        visible = visible_count((rows, cols), keep)
    except ValueError as error:
        raise UserError(f"not supported: {error}") from error
    encoder = segmenter.encoder
    gmacs = {
        "full": encoder_macs(segmenter, side, side) / 1e9,
        "keep": encoder_macs(segmenter, side, side, visible) / 1e9,
        "full_train": encoder_train_macs(segmenter, side, side) / 1e9,
        "keep_train": encoder_train_macs(segmenter, side, side, visible) / 1e9,
    }
    return {
        "backbone": backbone,
        "supported": True,
        "family": segmenter.family.title,
        "unit_px": segmenter.unit_px,
        "strides": list(encoder.strides),
        "image_size": side,
        "rounded_from": rounded_from,
        "units": rows * cols,
        "visible_units": visible,
        "tokens": [(side // stride) ** 2 for stride in encoder.strides],
        "prefix_tokens": encoder.prefix_tokens,
        "parameters_m": sum(parameter.numel() for parameter in segmenter.backbone.parameters()) / 1e6,
        "keep": keep,
        **{f"gmacs_{name}": value for name, value in gmacs.items()},
        "ideal_speedup": gmacs["full"] / gmacs["keep"],
        "ideal_speedup_train": gmacs["full_train"] / gmacs["keep_train"],
    }


def _build(backbone: str) -> Segmenter:
    from maskmatch_scale.models import build_segmenter

    with torch.device("meta"):
        return build_segmenter(backbone, 2, context=False)


def _whole_units(side: int, unit_px: int) -> int:
    return max(unit_px, round(side / unit_px) * unit_px)


def explain(found: dict[str, Any]) -> dict[str, str]:
    """The result of `examine` as rows of a table, by name."""
    tokens = ", ".join(str(count) for count in found["tokens"])
    strides = ", ".join(str(stride) for stride in found["strides"])
    prefix = f" and {found['prefix_tokens']} class and register tokens" if found["prefix_tokens"] else ""
    side = found["image_size"]
    size = f"{side}×{side} px" + (
        f" (rounded from {found['rounded_from']} px to whole units)" if found["rounded_from"] else ""
    )
    several = len(found["strides"]) > 1
    return {
        "supported": f"yes, {found['family']}",
        "unit": f"{found['unit_px']} px",
        "pixels a token" if several else "patch": f"{strides} px" + (", one a level" if several else ""),
        "parameters": f"{found['parameters_m']:.1f} M, of the backbone",
        "image": size,
        "tokens of an image": f"{tokens}{prefix}" + (", one a level" if several else ""),
        "visible": f"{found['visible_units']} of {found['units']} units (keep {found['keep']:g})",
        "GMACs, forward": _saving(found, ""),
        "GMACs, forward and backward": _saving(found, "_train"),
    }


def _saving(found: dict[str, Any], kind: str) -> str:
    return (
        f"{found[f'gmacs_full{kind}']:.2f} whole, {found[f'gmacs_keep{kind}']:.2f} masked: "
        f"at most {found[f'ideal_speedup{kind}']:.2f}× as fast"
    )
