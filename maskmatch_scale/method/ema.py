"""The teacher T ← EMA(S): its decay, and what a step needs of it. How it is stored is the engine's matter."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


def ema_decay(step: int, largest: float) -> float:
    """min(1 - 1/(t+1), α): a plain mean of the first students, then an exponential one (mean teacher's ramp).

    Args:
        step: t ≥ 1, the number of optimizer steps taken.
        largest: α.
    """
    return min(1 - 1 / (step + 1), largest)


class Teacher(Protocol):
    """The averaged student, in eval mode and without gradients."""

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to logits (B, classes, h, w)."""

    def update(self, decay: float) -> None:
        """T ← decay · T + (1 - decay) · S, from the fp32 master weights of S."""
