"""What weights are multiplied in: 16-bit autocast on fp32 weights, or nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from maskmatch_scale.recipe import Recipe


def autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    """What fp32 weights (the teacher's, and the student's under an autocast precision) are multiplied in."""
    precision = recipe.engine.precision
    return None if precision == "fp32" else torch.float16 if precision == "fp16" else torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """16-bit arithmetic on fp32 weights, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
