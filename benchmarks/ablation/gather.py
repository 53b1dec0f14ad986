"""From the results of cells to rows: one a cell, one an arm and mark, and one a pair of arms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.ablation.arms import ARMS
from benchmarks.ablation.equal_cost import run_cost
from benchmarks.ablation.job import EQUAL_COST, EQUAL_STEPS, read_result
from benchmarks.ablation.paired import paired_difference
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
        UserError: they are of different tasks, sources, data or weights, or one cell is there twice.
    """
    cells: dict[tuple[str, int], tuple[Row, Path]] = {}
    for folder in folders:
        result = read_result(folder)
        assert result is not None
        key = result["arm"], result["draw"]
        if key in cells:
            raise UserError(f"{folder} and {cells[key][1]} are the same cell; leave one out")
        for first, other in list(cells.values())[:1]:
            for name in ("sources", "data", "weights"):
                one, two = first["identity"].get(name), result["identity"].get(name)
                if one != two:
                    raise UserError(f"{folder} was made with other {name} ({two}) than {other} ({one}); report apart")
            for name in ("task", "eval_images", "curve_images"):
                if first[name] != result[name]:
                    raise UserError(
                        f"{folder} has another {name} ({result[name]}) than {other} ({first[name]}); report apart"
                    )
            if first["marks"][EQUAL_STEPS] != result["marks"][EQUAL_STEPS]:
                raise UserError(
                    f"{folder} is of {result['marks'][EQUAL_STEPS]} equal steps, {other} of "
                    f"{first['marks'][EQUAL_STEPS]}; report apart"
                )
        for cell, other in cells.values():
            one, two = cell["identity"].get("variants"), result["identity"].get("variants")
            if one and two and one != two:
                raise UserError(f"{folder} was made with other variants ({two}) than {other} ({one}); report apart")
        cells[key] = result, folder
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
                | {"tmacs": spent(cell, point["step"], "gmacs") / 1e3, "cost_cpu_s": spent_cpu_s(cell, point["step"])}
            )
    return found


def spent(cell: Row, step: int, unit: str) -> float:
    """`gmacs`: 10⁹ multiply–adds that a cell's backbone has taken after so many steps."""
    return run_cost(cell[unit], cell[f"burn_in_{unit}"], cell["burn_in_steps"], step)


def spent_cpu_s(cell: Row, step: int) -> float | None:
    """CPU-seconds after so many steps by the measured cost of a step; None: it was not measured."""
    cost = cell["cost"]
    return run_cost(cost["cpu_s"], cost["burn_in_cpu_s"], cell["burn_in_steps"], step) if cost else None


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


def by_arm(cells: Sequence[Row]) -> dict[str, list[Row]]:
    """Cells by the name of their arm."""
    arms: dict[str, list[Row]] = {}
    for cell in cells:
        arms.setdefault(cell["arm"], []).append(cell)
    return arms


def summary_rows(cells: Sequence[Row]) -> list[Row]:
    """One row an arm and mark: means over draws, and each draw's mIoU."""
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
            row["each draw"] = " ".join(f"{value_of(cell, mark):.3f}" for cell in at)
            row["boundary IoU"] = _mean(at, mark, "boundary_iou")
            row["pixel accuracy"] = _mean(at, mark, "pixel_accuracy")
            row["coverage"], row["label accuracy"] = _mean(at, mark, "coverage"), _mean(at, mark, "accuracy")
            row["s/step"] = mean(cell["results"][mark]["wall_s"] / cell["marks"][mark] for cell in at)
            row["cpu-s/step"] = at[0]["cost"]["cpu_s"] if at[0]["cost"] else None
            row["GMACs/step"] = at[0]["gmacs"]
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
