"""Results by the settings that differ between runs: which settings, and which runs lie on one line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from maskmatch_scale.record.curves import COLOURS, INK, Points
from maskmatch_scale.record.run_files import number

FEWEST_VALUES = 3
"""A setting with fewer values than this is compared in the table alone."""

_SAME = frozenset({"run.dir", "run.seed"})
"""Runs that differ in these alone are repetitions of each other."""


@dataclass(frozen=True)
class Swept:
    """One setting and what came out."""

    key: str
    lines: tuple[Points, ...]


def swept(runs: Sequence[tuple[Mapping[str, object], float | None]]) -> list[Swept]:
    """Find the numbers that runs of one backbone differ in, and sort the results by them.

    Args:
        runs: flat recipe, and result or None.

    Returns:
        An entry for each key, in the order of the recipe, that has at least :data:`FEWEST_VALUES` different numbers
        among the runs with a result. Runs that are alike in all other keys, except for their seed and directory, are
        one line; if there are no two of them, all runs are points of one group, without a label.
    """
    known = [(settings, result) for settings, result in runs if result is not None]
    keys = dict.fromkeys(key for settings, _ in known for key in settings if key not in _SAME)
    differing = [key for key in keys if len({shown(settings, key) for settings, _ in known}) > 1]
    found = []
    for key in differing:
        places = [number(settings.get(key)) for settings, _ in known]
        if len({place for place in places if place is not None}) >= FEWEST_VALUES:
            others = [other for other in differing if other != key]
            found.append(Swept(key, _lines(known, places, others)))
    return found


def _lines(
    known: Sequence[tuple[Mapping[str, object], float]], places: Sequence[float | None], others: Sequence[str]
) -> tuple[Points, ...]:
    groups: dict[str, list[tuple[float, float]]] = {}
    for (settings, result), place in zip(known, places):
        if place is not None:
            label = ", ".join(f"{key}={shown(settings, key)}" for key in others)
            groups.setdefault(label, []).append((place, result))
    if all(len({place for place, _ in group}) == 1 for group in groups.values()):
        groups = {"": [point for group in groups.values() for point in group]}
    return tuple(
        Points(label, COLOURS[count % len(COLOURS)] if len(groups) > 1 else INK, *np.array(sorted(group)).T)
        for count, (label, group) in enumerate(groups.items())
    )


def shown(settings: Mapping[str, object], key: str) -> str:
    """The value of a key as text; "" if the recipe has no such key."""
    if key not in settings:
        return ""
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)
