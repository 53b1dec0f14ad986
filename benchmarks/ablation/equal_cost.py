"""How many steps of an arm cost as much as S steps of the reference arm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from maskmatch_scale.errors import UserError

BURN_IN_ARM = "supervised"
"""Whose step is that of a burn-in: the labelled loss alone."""


def read_costs(path: Path) -> dict[str, float]:
    """CPU-seconds of a step by arm, from the file that `benchmarks.ablation.cost` writes, or a plain JSON object.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content.get("rows")
        found = {row["arm"]: row["cpu_s"] for row in rows} if isinstance(rows, list) else content
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--cost {path}: no JSON of arms and CPU-seconds ({error!r})") from None


def cost_of(costs: Mapping[str, float], arm: str) -> float:
    """CPU-seconds of a step of an arm after the burn-in.

    Raises:
        UserError: it was not measured.
    """
    if arm not in costs or not costs[arm] > 0:
        raise UserError(f"--cost: no cost of {arm}; measure it with python -m benchmarks.ablation.cost")
    return costs[arm]


def run_cost(step: float, burn_in_step: float, burn_in_steps: int, steps: int) -> float:
    """CPU-seconds of a run of so many steps, of which the first are its burn-in."""
    cheap = min(steps, burn_in_steps)
    return cheap * burn_in_step + (steps - cheap) * step


def steps_for(budget: float, step: float, burn_in_step: float, burn_in_steps: int) -> int:
    """Steps whose cost is nearest to a budget of CPU-seconds, at least 1."""
    in_burn_in = budget / burn_in_step
    if in_burn_in <= burn_in_steps:
        return max(1, round(in_burn_in))
    return max(1, round(burn_in_steps + (budget - burn_in_steps * burn_in_step) / step))
