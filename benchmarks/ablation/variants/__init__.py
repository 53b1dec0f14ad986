"""Behaviour that has no key of the recipe: callbacks that change a run from outside, by the name that an `Arm` gives.

What helps gets a key; until then the package knows nothing of it. All of them do nothing in the burn-in. They are for
one rank. `metrics.jsonl` goes on to give `loss` with the recipe's λ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.ablation.variants.base import Variant
from benchmarks.ablation.variants.by_class import FreeMatch, ThresholdByClass
from benchmarks.ablation.variants.context import ContextOff
from benchmarks.ablation.variants.ramps import LambdaRamp, ThresholdDown, ThresholdRamp
from benchmarks.ablation.variants.soft_labels import SoftLabels
from benchmarks.ablation.variants.teacher import LabelsTwice, ScalesInTurn
from maskmatch_scale.training.callbacks import Callback
from maskmatch_scale.training.run import Run

VARIANTS: Mapping[str, type[Variant]] = {
    "lambda_ramp": LambdaRamp,
    "threshold_ramp": ThresholdRamp,
    "threshold_down": ThresholdDown,
    "threshold_by_class": ThresholdByClass,
    "threshold_freematch": FreeMatch,
    "soft_labels": SoftLabels,
    "context_off": ContextOff,
    "labels_twice": LabelsTwice,
    "scales_in_turn": ScalesInTurn,
}
"""All variants by name."""


def callbacks_of(variant: str | None, steps: int) -> list[Callable[[Run], Callback]]:
    """What `train` takes as callbacks: none or one.

    Args:
        variant: a name in `VARIANTS`, or None.
        steps: S of the grid.
    """
    return [] if variant is None else [lambda run: VARIANTS[variant](run, steps)]


def period_of(variant: str | None) -> int:
    """Steps after which the cost of a step repeats."""
    return 1 if variant is None else VARIANTS[variant].period


def identity_of_variant(variant: str | None) -> dict[str, str]:
    """For the identity of a cell: a hash of these files (the first 16 digits of sha256); without a variant, none.

    So cells without one can still be used when a variant is added.
    """
    if variant is None:
        return {}
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return {"variants": digest.hexdigest()[:16]}
