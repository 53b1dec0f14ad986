"""The table of the quickstart: what `make quickstart` measured with one or several seeds, and the machine it ran on.

make quickstart && make quickstart SEED=1 OUT=runs/quickstart-1          # and so on
python -m benchmarks.quickstart --runs runs/quickstart runs/quickstart-1 --out benchmarks/results/quickstart.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.harness import check_out, describe_machine, machine_line, markdown_table, say, write_json
from benchmarks.paired import paired_difference
from maskmatch_scale.errors import UserError
from maskmatch_scale.record.summary import as_rows, summarise

COLUMNS = ("run", "seed", "backbone", "method", "split", "miou", "pixel_accuracy", "images_per_s", "seconds", "cpu_s")
SUMMARY = ("backbone", "method", "split", "seeds", "miou", "miou of each seed", "cpu_s")
DIFFERENCES = ("backbone", "method", "minus", "split", "difference", "low", "high", "seeds")
HELD_OUT = ("val", "val_font")


def rows_of(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """One row for each run and held-out split, with the teacher's figures.

    Raises:
        UserError: two runs have the same backbone, method and seed, or a run was not evaluated on both splits.
    """
    rows = []
    for row, path in zip(as_rows([summarise(run) for run in runs]), runs, strict=True):
        scores = {score["split"]: score for score in row["scores"] if score["weights"] == "ema"}
        for split in HELD_OUT:
            if split not in scores:
                raise UserError(f"--runs: {path} has no result on {split}: maskmatch evaluate {path} --split {split}")
            figures = {key: scores[split][key] for key in ("split", "miou", "pixel_accuracy")}
            rows.append({key: (row | figures)[key] for key in (*COLUMNS, "steps_done")})
    same = [tuple(row[key] for key in ("backbone", "method", "split", "seed")) for row in rows]
    twice = next((key for key in same if same.count(key) > 1), None)
    if twice:
        raise UserError(f"--runs: {' '.join(map(str, twice))} is there twice; name each seed's folder once")
    return rows


def summary_of(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Means over seeds of each backbone, method and split; and paired differences of methods, with 95 % intervals."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["backbone"], row["split"]][row["method"]].append(row)
    means, differences = [], []
    for (backbone, split), methods in groups.items():
        values = {name: {row["seed"]: row["miou"] for row in found} for name, found in methods.items()}
        for name, found in methods.items():
            each = " ".join(f"{values[name][seed]:.3f}" for seed in sorted(values[name]))
            means.append(
                {"backbone": backbone, "method": name, "split": split, "seeds": len(found)}
                | {"miou": mean(values[name].values()), "miou of each seed": each}
                | {"cpu_s": mean(row["cpu_s"] for row in found)}
            )
        names = list(methods)
        for name, other in ((a, b) for i, b in enumerate(names) for a in names[i + 1 :]):
            found_difference = paired_difference(values[name], values[other])
            if found_difference:
                differences.append(
                    {"backbone": backbone, "method": name, "minus": other, "split": split}
                    | {"difference": found_difference.mean, "low": found_difference.low}
                    | {"high": found_difference.high, "seeds": found_difference.draws}
                )
    return means, differences


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[Path("runs/quickstart")], help="folders of the quickstart, one a seed"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a Markdown table goes beside it")
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
        runs = [run for folder in options.runs for run in finished_in(folder)]
        rows = rows_of(runs)
    except ValueError as error:
        say(f"error: {error}")
        sys.exit(2)
    ranks = sorted({json.loads((run / "summary.json").read_text())["world_size"] for run in runs})
    machine = describe_machine(torch.device("cpu"), ["maskmatch_scale", "configs", "launch"])
    # The runs were other processes than this one: what they used is in their own files.
    del machine["threads"], machine["load_at_start"]
    machine |= {"clock": "wall time, and CPU time of all ranks", "ranks": ", ".join(map(str, ranks))}
    means, differences = summary_of(rows)
    write_json(options.out, machine, rows, summary=means, differences=differences)
    page = [
        "# quickstart: the teacher on held-out pages",
        machine_line(machine),
        "A seed decides the initial weights, the order of images, and which pages keep their labels.",
        markdown_table(means, SUMMARY),
        "Paired differences of mIoU with Student's 95 % interval:",
        markdown_table(differences, DIFFERENCES),
        "All runs:",
        markdown_table(rows, COLUMNS),
    ]
    options.out.with_suffix(".md").write_text("\n\n".join(part.rstrip() for part in page) + "\n", encoding="utf-8")


def finished_in(folder: Path) -> list[Path]:
    """The finished runs of one quickstart.

    Raises:
        UserError: there is none.
    """
    runs = sorted(path.parent for path in folder.glob("*/summary.json") if ".previous-" not in str(path))
    if not runs:
        raise UserError(f"--runs {folder}: no finished run there; `make quickstart` makes six")
    return runs


if __name__ == "__main__":
    main()
