"""JSON, Markdown and plot from the finished cells of one or several work folders.

python -m benchmarks.ablation.report WORK [WORK …] --out X.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation.gather import (
    curves_of,
    difference_rows,
    finished_in,
    main_split,
    read_cells,
    rows_of,
    summary_rows,
)
from benchmarks.ablation.job import EQUAL_COST, EQUAL_STEPS
from benchmarks.ablation.plot import draw
from benchmarks.ablation.tasks import TASKS
from benchmarks.harness import check_out, markdown_table, say, write_json

SPREAD = ("arm", "minus", "at", "split", "difference", "low", "high", "draws")


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write `out`, and Markdown and plot beside it.

    Raises:
        UserError: the cells do not belong together; nothing is written.
    """
    cells = read_cells(folders)
    rows, curves = rows_of(cells), curves_of(cells)
    summary = summary_rows(cells)
    differences = [row for split in cells[0]["splits"] or ["dev"] for row in difference_rows(cells, split)]
    machine = machines_of(cells)
    write_json(out, machine, rows, curves=curves, summary=summary, differences=differences)
    title = title_of(cells)
    out.with_suffix(".md").write_text(page(title, machine, cells, summary, differences), encoding="utf-8")
    draw(title, cells, difference_rows(cells), curves).savefig(out.with_suffix(".png"), dpi=110)


def title_of(cells: Sequence[dict[str, Any]]) -> str:
    """Task, labels, length and number of draws."""
    counts = {cell["recipe"]["data"]["labelled_count"] for cell in cells} - {None}
    labels = f"{' or '.join(map(str, sorted(counts)))} labelled images, " if counts else ""
    draws = len({cell["draw"] for cell in cells})
    some = cells[0]["eval_images"]
    part = f", {some} images of each split" if some else ""
    return (
        f"{TASKS[cells[0]['task']].title}: {labels}{cells[0]['marks'][EQUAL_STEPS]} steps, "
        f"{draws} draw{'s' if draws > 1 else ''}{part}"
    )


def machines_of(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The machine; where cells ran on several, all values of a fact."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for cell in cells for name in cell["machine"]):
        values = list(dict.fromkeys(cell["machine"].get(name) for cell in cells))
        found[name] = values[0] if len(values) == 1 else "; ".join(map(str, values))
    return found


def page(
    title: str,
    machine: dict[str, Any],
    cells: Sequence[dict[str, Any]],
    summary: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
) -> str:
    """The tables in Markdown."""
    facts = " · ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items() if value is not None)
    lines = [f"# {title}", "", facts, ""]
    lines += [
        "The teacher is scored, in windows of the training crop. Means over draws; where no split is named, "
        f"`{main_split(cells[0])}`. Pseudo-labels are checked on",
        "training images that the draw left without labels: `coverage` is the share of pixels that count, `label",
        "accuracy` that of right ones among them. `s/step` is wall time with all jobs running, `cpu-s/step` the",
        "measured cost of a step after the burn-in, `GMACs/step` its counted multiply–adds of the backbone.",
        "",
    ]
    for mark in (EQUAL_STEPS, EQUAL_COST):
        at = [row for row in summary if row["at"] == mark]
        if at:
            columns = [name for name in at[0] if name not in {"title", "at"}]
            lines += [f"## At {mark}", "", markdown_table([_fine(row) for row in at], columns)]
    if differences:
        lines += ["## Paired differences of mIoU, with the 95 % interval of Student's t over draws", ""]
        lines.append(markdown_table([_signed(row) for row in differences], SPREAD))
    return "\n".join(lines)


def _fine(row: dict[str, Any]) -> dict[str, Any]:
    """Scores with three digits after the point."""
    scores = ("mIoU", "IoU", "accuracy", "coverage")
    return {
        name: f"{value:.3f}" if isinstance(value, float) and name.endswith(scores) else value
        for name, value in row.items()
    }


def _signed(row: dict[str, Any]) -> dict[str, Any]:
    return row | {name: f"{row[name]:+.4f}" for name in ("difference", "low", "high") if row[name] is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the cells and write the report; 2 for a mistake."""
    parser = argparse.ArgumentParser("python -m benchmarks.ablation.report", description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path, nargs="+", help="work folders of the same task, sources, data and weights")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a Markdown table and a plot go beside it")
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
        write_report([folder for work in options.work for folder in finished_in(work)], options.out)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
