"""Where and in which arithmetic a segmenter runs, and how many windows fit into its memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.errors import UserError
from maskmatch_scale.progress import show

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

_FIRST_BATCH = {"cpu": 2}
"""Windows in the first forward pass. A CPU has work for all its cores with two."""
_FIRST_BATCH_ELSEWHERE = 32


def choose_device(wanted: str | None, place: Place) -> torch.device:
    """The device of a rank.

    Args:
        wanted: `cpu`, `cuda`, `cuda:N`, or None: a GPU if there is one. Without a number each rank of a machine takes
            a GPU of its own, as far as there are enough.
        place: of this rank.

    Raises:
        UserError: there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = torch.device("cuda", place.local_rank % count) if count else torch.device("cpu")
    if wanted is None:
        return own
    kind, _, number = wanted.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise UserError(f"--device {wanted}: it must be cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not count:
        raise UserError(f"--device {wanted}: torch finds no GPU on this machine; use cpu")
    if number and int(number) >= count:
        raise UserError(f"--device {wanted}: this machine has {count} GPU{'s' if count > 1 else ''}, from cuda:0 on")
    return torch.device("cuda", int(number)) if number else own


def choose_precision(wanted: str, device: torch.device) -> str:
    """The arithmetic of products: `fp32`, `bf16` or `fp16`. Weights and probabilities are always fp32.

    Args:
        wanted: one of :data:`PRECISIONS`. `auto`: bf16 on a GPU that has it, otherwise fp32.
        device: that the segmenter is on.

    Raises:
        UserError: there is no such precision, or the device does not have it.
    """
    if wanted not in PRECISIONS:
        raise UserError(f"--precision {wanted}: it must be one of {', '.join(PRECISIONS)}")
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if device.type == "cuda" and has_bf16 else "fp32"
    if wanted == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16: it needs a GPU; use fp32 or bf16")
    if wanted == "bf16" and not has_bf16:
        raise UserError("--precision bf16: this GPU has no bf16 arithmetic; use fp16 or fp32")
    return wanted


DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""For `engine.precision.autocast`."""


class FittingBatches:
    """Runs a segmenter on as many windows at a time as its device has memory for.

    When memory runs out, half as many windows are tried, until they fit, and that number is kept.

    Args:
        segmenter: normalised images (B, 3, h, w) to logits.
        batch: windows in the first forward pass; None: 2 on a CPU, 32 elsewhere.
        device: that the segmenter is on.
    """

    def __init__(self, segmenter: Callable[[Tensor], Tensor], batch: int | None, device: torch.device) -> None:
        self._segmenter = segmenter
        self.batch = batch or _FIRST_BATCH.get(device.type, _FIRST_BATCH_ELSEWHERE)
        """Windows in a forward pass."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of images, in one or several passes.

        Raises:
            UserError: there is no memory for a single one.
        """
        while True:
            try:
                return torch.cat([self._segmenter(some) for some in torch.split(images, self.batch)])
            except torch.OutOfMemoryError:
                if min(self.batch, len(images)) == 1:
                    height, width = images.shape[2:]
                    raise UserError(
                        f"one window of {height}×{width} px does not fit into the memory of {images.device}; set "
                        "evaluation.window_px smaller, --precision bf16, or --device cpu"
                    ) from None
                self.batch = min(self.batch, len(images)) // 2
            # Here, because the traceback holds the tensors of the pass that failed.
            torch.cuda.empty_cache()
            show(f"{images.device} is full: {self.batch} windows at a time from here on")
