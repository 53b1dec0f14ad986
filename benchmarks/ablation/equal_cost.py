"""How many steps of an arm cost as much as S steps of the reference arm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmatch_scale.errors import UserError

BURN_IN_ARM = "supervised"
"""Whose step is that of a burn-in: the labelled loss alone."""


@dataclass(frozen=True)
class Costs:
    """What was measured of arms, by their names."""

    cpu_s: dict[str, float]
    """CPU-seconds of a step after the burn-in."""
    gmacs: dict[str, float]
    """Its counted multiply–adds in 10⁹: a run whose step has others is not the one that was measured."""

    def of(self, arm: str) -> float:
        """CPU-seconds of a step of an arm after the burn-in.

        Raises:
            UserError: it was not measured.
        """
        if not self.cpu_s.get(arm, 0.0) > 0:
            raise UserError(f"--cost: no cost of {arm}; measure it with python -m benchmarks.ablation.cost")
        return self.cpu_s[arm]


def read_costs(path: Path) -> Costs:
    """Costs of a step by arm, from the file that `benchmarks.ablation.cost` writes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        cpu_s, gmacs = ({row["arm"]: float(row[key]) for row in rows} for key in ("cpu_s", "gmacs"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--cost {path}: no file of benchmarks.ablation.cost ({error!r})") from None
    return Costs(cpu_s, gmacs)


def check_measured(cost: Mapping[str, float] | None, gmacs: float) -> None:
    """Refuse a cost that was measured with other images, batches or models than a run has.

    Args:
        cost: of a job.
        gmacs: 10⁹ multiply–adds of the run's step.

    Raises:
        UserError: says both counts.
    """
    if cost is not None and abs(cost["gmacs"] / gmacs - 1) > 0.01:
        raise UserError(
            f"--cost was measured of a step of {cost['gmacs']:.4g} GMACs, and this run's has {gmacs:.4g}; measure it "
            "with the same --set"
        )


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


def spent(cell: Mapping[str, Any], step: int) -> float:
    """10⁹ multiply–adds that a cell's backbone has taken after so many steps."""
    return run_cost(cell["gmacs"], cell["burn_in_gmacs"], cell["burn_in_steps"], step)


def spent_cpu_s(cell: Mapping[str, Any], step: int) -> float | None:
    """CPU-seconds after so many steps by the measured cost of a step; None: it was not measured."""
    cost = cell["cost"]
    return run_cost(cost["cpu_s"], cost["burn_in_cpu_s"], cell["burn_in_steps"], step) if cost else None
