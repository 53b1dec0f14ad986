"""The table of the quickstart: what `make quickstart` measured, with the machine it ran on.

make quickstart
python -m benchmarks.quickstart --out benchmarks/results/quickstart.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import check_out, describe_machine, markdown, say, write_json
from maskmatch_scale.errors import UserError
from maskmatch_scale.record.summary import as_rows, summarise

COLUMNS = ("run", "backbone", "method", "split", "miou", "pixel_accuracy", "images_per_s", "seconds", "cpu_s")


def rows_of(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """One row for each run and held-out split, with the teacher's figures."""
    rows = []
    for row in as_rows([summarise(run) for run in runs]):
        for score in row["scores"]:
            if score["weights"] == "ema" and score["split"] != "dev":
                figures = {key: score[key] for key in ("split", "miou", "pixel_accuracy")}
                rows.append({key: (row | figures)[key] for key in (*COLUMNS, "seed", "steps_done")})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart"), help="folder of the quickstart's runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a Markdown table goes beside it")
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
        runs = sorted(path.parent for path in options.runs.glob("*/summary.json") if ".previous-" not in str(path))
        if not runs:
            raise UserError(f"--runs {options.runs}: no finished run there; `make quickstart` makes six")
        rows = rows_of(runs)
    except ValueError as error:
        say(f"error: {error}")
        sys.exit(2)
    ranks = sorted({json.loads((run / "summary.json").read_text())["world_size"] for run in runs})
    machine = describe_machine(torch.device("cpu"), ["maskmatch_scale", "configs", "launch"])
    # The runs were other processes than this one: what they used is in their own files.
    del machine["threads"], machine["load_at_start"]
    machine |= {"clock": "wall time, and CPU time of all ranks", "ranks": ", ".join(map(str, ranks))}
    write_json(options.out, machine, rows)
    title = "quickstart: the teacher on held-out pages, one seed a method"
    options.out.with_suffix(".md").write_text(markdown(title, machine, rows, COLUMNS), encoding="utf-8")


if __name__ == "__main__":
    main()
