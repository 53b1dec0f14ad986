"""Paired differences of two arms over draws of labels, with Student's t interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, mean, stdev

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantiles of Student's t, for 1 to 30 degrees of freedom."""


def t_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; above 30 degrees of freedom by the first terms of its series."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences."""

    mean: float
    low: float | None
    """Of the 95 % interval; None with a single pair."""
    high: float | None
    draws: int
    """Pairs."""


def paired_difference(values: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """Mean of ``values`` − ``others`` over the draws that both have, with its 95 % interval; None: they share none."""
    pairs = [values[draw] - others[draw] for draw in sorted(values.keys() & others.keys())]
    if not pairs:
        return None
    if len(pairs) == 1:
        return Difference(pairs[0], None, None, 1)
    half = t_975(len(pairs) - 1) * stdev(pairs) / sqrt(len(pairs))
    return Difference(mean(pairs), mean(pairs) - half, mean(pairs) + half, len(pairs))
