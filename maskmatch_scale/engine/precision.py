"""The precision of a run: how it is chosen, and the arithmetic that follows from it.

Decision: docs/decisions/0014-pixel-shuffle-on-segformer.md.
Decision: docs/decisions/0025-unsound-combinations-as-rows.md.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import Recipe

Precision = Literal["fp32", "bf16", "fp16", "autocast-bf16"]


def choose_precision(recipe: Recipe, *, batchnorm: bool) -> tuple[Precision, str]:
    """Choose the precision of a run on this machine; called before any process group exists.

    Args:
        recipe: its `engine` section is read.
        batchnorm: whether the model has a BatchNorm.

    Returns:
        The precision, never `auto`, and the reason for it.

    Raises:
        UserError: the machine or the model cannot use the precision of the recipe; the message says what it can use.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    has_bf16 = gpu is None or torch.cuda.is_bf16_supported(including_emulation=False)
    return precision_for(recipe, gpu, has_bf16=has_bf16, batchnorm=batchnorm)


def precision_for(recipe: Recipe, gpu: str | None, *, has_bf16: bool, batchnorm: bool) -> tuple[Precision, str]:
    """As :func:`choose_precision`, for any machine.

    Args:
        recipe: its `engine` section is read.
        gpu: its name; None: there is none.
        has_bf16: whether it computes in bf16.
        batchnorm: whether the model has a BatchNorm.
    """
    engine, wanted = recipe.engine, recipe.engine.precision
    if wanted == "auto":
        if gpu is None:
            return "fp32", "engine.precision=auto, and there is no GPU"
        if not has_bf16:
            return "fp32", f"engine.precision=auto, and a {gpu} has no bf16 arithmetic"
        if batchnorm:
            return "autocast-bf16", "engine.precision=auto, and this model's BatchNorm rules out bf16 weights"
        if engine.zero_stage == 0:
            return "autocast-bf16", "engine.precision=auto, and engine.zero_stage=0 rules out bf16 weights"
        return "bf16", "engine.precision=auto, and this model and machine can use bf16 weights with fp32 masters"
    if wanted == "fp16" and gpu is None:
        raise UserError(
            "engine.precision=fp16: it needs a GPU, and this machine has none; use fp32, bf16 or autocast-bf16"
        )
    if wanted in ("bf16", "autocast-bf16") and not has_bf16:
        raise UserError(f"engine.precision={wanted}: a {gpu} has no bf16 arithmetic; use fp16 or fp32")
    if wanted in ("bf16", "fp16") and batchnorm and engine.library == "deepspeed":
        raise UserError(
            f"engine.precision={wanted}: this model has a BatchNorm, whose buffers DeepSpeed leaves in fp32; use "
            "engine.precision=autocast-bf16, or a head without one (model.head=linear)"
        )
    return wanted, "engine.precision"


def uses_tf32(device: torch.device, precision: str) -> bool:
    """Whether products of fp32 matrices run in TF32: in fp32 runs on a GPU.

    TF32 keeps the exponents of fp32 and 10 bits of its mantissa. Without it a GPU multiplies fp32 matrices at a small
    part of its speed. Convolutions run in TF32 by torch's default.
    """
    return device.type == "cuda" and precision == "fp32"


def autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    """The type in which fp32 weights are multiplied: the teacher's, and the student's under autocast. None: in fp32."""
    precision = recipe.engine.precision
    assert precision != "auto", "the precision is chosen before a run is built (choose_precision)"
    return None if precision == "fp32" else torch.float16 if precision == "fp16" else torch.bfloat16


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """The type of the student's weights under DeepSpeed."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.engine.precision, torch.float32)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Autocast to ``dtype``, or nothing if it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
