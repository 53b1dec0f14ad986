"""JSON, Markdown and plot from the finished cells of one or several work folders.

python -m benchmarks.ablation.report WORK [WORK …] --out X.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation.gather import curves_of, difference_rows, finished_in, read_cells, rows_of, summary_rows
from benchmarks.ablation.page import page, settings_of, title_of
from benchmarks.ablation.plot import draw
from benchmarks.ablation.sources import commit_of
from benchmarks.harness import check_out, say, write_json


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
    settings = [{"key": key, "value": value} for key, value in settings_of(cells).items()]
    write_json(out, machine, rows, settings=settings, curves=curves, summary=summary, differences=differences)
    title = title_of(cells)
    out.with_suffix(".md").write_text(page(title, machine, cells, summary, differences), encoding="utf-8")
    draw(title, cells, difference_rows(cells), curves).savefig(out.with_suffix(".png"), dpi=110)


def machines_of(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The machine, where cells ran on several all values of a fact; and the commit whose sources were run.

    The commit is looked for by the hash of the sources: the grid may have run in a copy, whose own says nothing.
    """
    found: dict[str, Any] = {}
    names = dict.fromkeys(name for cell in cells for name in cell["machine"])
    for name in [name for name in names if name not in {"commit", "sources"}]:
        values = list(dict.fromkeys(cell["machine"].get(name) for cell in cells))
        found[name] = values[0] if len(values) == 1 else "; ".join(map(str, values))
    commit = commit_of(cells[0]["identity"]["sources"])
    return found | {"commit": f"{commit} has these sources" if commit else "none of this checkout has these sources"}


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
