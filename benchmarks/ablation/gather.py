"""From the results of cells to rows: one a cell, one an arm and mark, and one a pair of arms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.ablation.arms import ARMS
from benchmarks.ablation.equal_cost import spent, spent_cpu_s
from benchmarks.ablation.job import EQUAL_COST, EQUAL_STEPS, read_result
from benchmarks.ablation.together import check_together
from benchmarks.paired import paired_difference
from maskmatch_scale.errors import UserError

BASELINES = ("supervised", "fixmatch")
"""Arms that every other one is compared with."""
MAIN_SPLIT = "val"
"""Where arms are compared; `dev` in a grid that was not evaluated there (`--splits`)."""
MARKS = (EQUAL_STEPS, EQUAL_COST)
Row = dict[str, Any]


def finished_in(work: Path) -> list[Path]:
    """Folders of the finished cells of a work folder.

    Raises:
        UserError: there is none.
    """
    found = sorted(path.parent for path in work.glob("*/draw-*/result.json"))
    if not found:
        raise UserError(f"{work}: no finished cell there (*/draw-*/result.json)")
    return found


def read_cells(folders: Sequence[Path]) -> list[Row]:
    """The results of cells that belong together, by arm and draw.

    Raises:
        UserError: they do not belong together (`together.py`), or one cell is there twice.
    """
    cells: dict[tuple[str, int], tuple[Row, Path]] = {}
    for folder in folders:
        result = read_result(folder)
        assert result is not None
        key = result["arm"], result["draw"]
        if key in cells:
            raise UserError(f"{folder} and {cells[key][1]} are the same cell; leave one out")
        cells[key] = result, folder
    check_together(list(cells.values()))
    order = list(ARMS)
    return sorted(
        (result for result, _ in cells.values()),
        key=lambda cell: (order.index(cell["arm"]) if cell["arm"] in ARMS else len(order), cell["arm"], cell["draw"]),
    )


def rows_of(cells: Sequence[Row]) -> list[Row]:
    """One row a cell: what was run, and the figures at each mark."""
    names = ("task", "arm", "title", "group", "draw", "marks", "cost", "gmacs", "burn_in_gmacs", "burn_in_steps")
    return [
        {name: cell[name] for name in names}
        | {
            "labelled": cell["recipe"]["data"]["labelled_count"],
            "device": cell["device"],
            "results": cell["results"],
            "recipe": cell["recipe"]["method"],
        }
        for cell in cells
    ]


def curves_of(cells: Sequence[Row]) -> list[Row]:
    """One row a point of a curve on `dev`, with what was spent until then."""
    found = []
    for cell in cells:
        for point in cell["curve"]:
            found.append(
                {"arm": cell["arm"], "draw": cell["draw"], **point}
                | {"tmacs": spent(cell, point["step"]) / 1e3, "cost_cpu_s": spent_cpu_s(cell, point["step"])}
            )
    return found


@dataclass(frozen=True)
class Spread:
    """How far arms that have so far trained alike are apart on `dev`: largest minus smallest mIoU of a draw."""

    step: int
    mean: float
    """Over draws."""
    most: float
    """Of all draws."""


def spread_in_burn_in(cells: Sequence[Row]) -> Spread | None:
    """The spread at the last point of the curves within the burn-in; None: there is no point, or it is exactly 0.

    Only of arms that do nothing else than the others in it.
    """
    alike = [cell for cell in cells if cell["group"] in {"bases", "cheap step"}]
    steps = [{point["step"] for point in cell["curve"] if point["step"] <= cell["burn_in_steps"]} for cell in alike]
    step = max(set.intersection(*steps), default=None) if steps else None
    if step is None:
        return None
    by_draw: dict[int, list[float]] = {}
    for cell in alike:
        by_draw.setdefault(cell["draw"], []).append(next(p["miou"] for p in cell["curve"] if p["step"] == step))
    ranges = [max(own) - min(own) for own in by_draw.values() if len(own) > 1]
    most = max(ranges, default=0.0)
    return Spread(step, mean(ranges), most) if most else None


def value_of(cell: Row, mark: str, what: str = "miou", split: str | None = None) -> float | None:
    """A figure of a cell at a mark; None: it was not measured."""
    at = cell["results"].get(mark)
    if at is None:
        return None
    source = at["pseudo_labels"] if what in {"coverage", "accuracy"} else at["splits"][split or main_split(cell)]
    value: float | None = source[what]
    return value


def main_split(cell: Row) -> str:
    """The split on which a cell's arm is compared with others."""
    return MAIN_SPLIT if MAIN_SPLIT in cell["splits"] else "dev"


def draws_of(cells: Sequence[Row]) -> list[int]:
    """Numbers of all draws of a grid."""
    return sorted({cell["draw"] for cell in cells})


def by_arm(cells: Sequence[Row]) -> dict[str, list[Row]]:
    """Cells by the name of their arm."""
    arms: dict[str, list[Row]] = {}
    for cell in cells:
        arms.setdefault(cell["arm"], []).append(cell)
    return arms


def summary_rows(cells: Sequence[Row]) -> list[Row]:
    """One row an arm and mark: means over draws, the mIoU of each draw of the grid (None: not run), and the cost."""
    found = []
    splits = list(cells[0]["results"][EQUAL_STEPS]["splits"])
    for mark in MARKS:
        for arm, own in by_arm(cells).items():
            at = [cell for cell in own if mark in cell["results"]]
            if not at:
                continue
            row = {"arm": arm, "title": at[0]["title"], "at": mark, "draws": len(at)}
            row["steps"] = at[0]["marks"][mark]
            for split in splits:
                row[f"{split} mIoU"] = _mean(at, mark, "miou", split)
            found_in = {cell["draw"]: value_of(cell, mark) for cell in at}
            row["each draw"] = [found_in.get(draw) for draw in draws_of(cells)]
            row["boundary IoU"] = _mean(at, mark, "boundary_iou")
            row["pixel accuracy"] = _mean(at, mark, "pixel_accuracy")
            row["coverage"], row["label accuracy"] = _mean(at, mark, "coverage"), _mean(at, mark, "accuracy")
            row["GMACs/step"], row["TMACs"] = at[0]["gmacs"], spent(at[0], row["steps"]) / 1e3
            row["CPU-s/step"] = at[0]["cost"]["cpu_s"] if at[0]["cost"] else None
            row["CPU-s"] = spent_cpu_s(at[0], row["steps"])
            found.append(row)
    return found


def _mean(cells: Sequence[Row], mark: str, what: str, split: str | None = None) -> float | None:
    values = [value for cell in cells if (value := value_of(cell, mark, what, split)) is not None]
    return mean(values) if values else None


def difference_rows(cells: Sequence[Row], split: str | None = None) -> list[Row]:
    """One row for each mark, baseline and other arm: the paired difference of mIoU on a split."""
    return list(_differences(cells, split))


def _differences(cells: Sequence[Row], split: str | None) -> Iterator[Row]:
    arms, split = by_arm(cells), split or main_split(cells[0])
    for mark in MARKS:
        values = {
            arm: {cell["draw"]: value for cell in own if (value := value_of(cell, mark, split=split)) is not None}
            for arm, own in arms.items()
        }
        for baseline in BASELINES:
            for arm, own in arms.items():
                if arm == baseline or baseline not in arms:
                    continue
                found = paired_difference(values[arm], values[baseline])
                if found is not None:
                    yield {
                        "arm": arm,
                        "title": own[0]["title"],
                        "minus": baseline,
                        "at": mark,
                        "split": split,
                        "difference": found.mean,
                        "low": found.low,
                        "high": found.high,
                        "draws": found.draws,
                    }
