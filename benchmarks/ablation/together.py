"""Whether cells belong into one table: of one code, data and evaluation, and unlike only in what their arms change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation.arms import ARMS
from benchmarks.ablation.equal_cost import spent_cpu_s
from benchmarks.ablation.job import EQUAL_COST, EQUAL_STEPS
from benchmarks.ablation.tasks import FIXED
from maskmatch_scale.errors import UserError

Cell = Mapping[str, Any]
"""A `result.json`."""
UNCOMPARED = FIXED | {"data.unlabelled", "data.workers"}
"""Keys that differ by draw, length, place or machine."""


def check_together(cells: Sequence[tuple[Cell, Path]]) -> None:
    """Refuse cells that would make a table in which more than the arms differs.

    Args:
        cells: results, with their folders.

    Raises:
        UserError: names the two folders, and what differs.
    """
    seen: dict[str, tuple[Any, Path]] = {}
    for cell, folder in cells:
        for name, value in _shared_facts(cell):
            before, other = seen.setdefault(name, (value, folder))
            if before != value:
                raise UserError(f"{folder} was made with other {name} ({value}) than {other} ({before}); report apart")
    first, other = cells[0]
    for cell, folder in cells[1:]:
        one, two = (spent_cpu_s(each, each["marks"].get(EQUAL_COST, 0)) for each in (first, cell))
        if one is None or two is None:
            continue  # both, as the cost of a burn-in step is among the facts
        if abs(one - two) > first["cost"]["cpu_s"] + cell["cost"]["cpu_s"]:  # each is of whole steps
            raise UserError(
                f"{folder} costs {two:.0f} CPU-seconds at equal cost, and {other} {one:.0f}: they were planned with "
                "another --reference or --cost; report apart"
            )


def _shared_facts(cell: Cell) -> Iterator[tuple[str, Any]]:
    """What must be the same in all cells, in the order in which it is compared."""
    for name in ("sources", "measuring code", "data", "weights"):
        yield name, cell["identity"].get(name)
    yield f"start of draw {cell['draw']}", cell["identity"].get("start")
    yield "kind of start", cell.get("start")
    if "variants" in cell["identity"]:
        yield "variants", cell["identity"]["variants"]
    for name in ("task", "splits", "eval_images", "curve_images", "pseudo_images"):
        yield name, cell[name]
    yield EQUAL_STEPS, cell["marks"][EQUAL_STEPS]
    yield "CPU-seconds of a step of the burn-in", (cell["cost"] or {}).get("burn_in_cpu_s")
    yield from keys_beside_arm(cell["arm"], cell["recipe"], cell["burn_in_steps"] / cell["marks"][EQUAL_STEPS]).items()


def keys_beside_arm(arm: str, recipe: Mapping[str, Any], burn_in: float) -> dict[str, Any]:
    """The values of a recipe by dotted key, without those that its arm, the draw or the place decides.

    Args:
        arm: its name; of one that is no longer there, all keys of the method are its own.
        recipe: sections.
        burn_in: as a share of S steps; a longer run's recipe says another share.
    """
    own = tuple(ARMS[arm].overrides) if arm in ARMS else ("method",)
    every = dict(_flat(recipe)) | {"method.burn_in": burn_in}
    return {
        key: value
        for key, value in every.items()
        if key not in UNCOMPARED and not any(f"{key}.".startswith(f"{name}.") for name in own)
    }


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{before}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value
