"""The command line: ``python -m benchmarks.scaling_model --out FILE.json``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import check_out, describe_machine, say, write_json
from benchmarks.scaling_model import archive, failures
from benchmarks.scaling_model.cases import CASES, GPU, STAGES
from benchmarks.scaling_model.doc import with_tables
from benchmarks.scaling_model.measure import compare, measure, reason_not, recipe_of
from benchmarks.scaling_model.report import draw, page
from benchmarks.scaling_model.steps import planned, strong, weak
from maskmatch_scale.planning.build import build
from maskmatch_scale.planning.hardware import gpu_named

SOURCES = ("benchmarks/scaling_model", "benchmarks/harness.py", "maskmatch_scale/planning")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scaling_model",
        description="Predicts steps, checkpoints and data from 1 to 4,096 GPUs, and compares the part about the "
        "network with runs of 1, 2 and 4 ranks over slow links on this machine.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; .md and .png are written beside it")
    add("--no-measure", action="store_true", help="predict alone; measuring needs root, unshare, ip and tc")
    add("--doc", type=Path, metavar="FILE.md", help="write the tables of --out into that page; nothing is run then")
    add("--work", type=Path, metavar="FOLDER", help="keep the measured runs there, and go on with them the next time")
    add("--steps-from", type=Path, metavar="FILE.json", help="take the predicted steps of an earlier run from its file")
    names = [case.name for case in CASES]
    add("--models", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}; default all")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, predict, and write JSON, Markdown and the plot."""
    options = parse(arguments)
    try:
        check_out(options.out)
    except ValueError as error:
        say(f"scaling_model: {error}")
        return 2
    if options.doc is not None:
        made = with_tables(options.doc.read_text(encoding="utf-8"), json.loads(options.out.read_text(encoding="utf-8")))
        options.doc.write_text(made, encoding="utf-8")
        return 0
    begin = time.perf_counter()
    machine = describe_machine(torch.device("cpu"), SOURCES)
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "strong": [], "failures": [], "measured": [], "check": []}
    reason = "--no-measure" if options.no_measure else reason_not()
    if reason is None:
        with tempfile.TemporaryDirectory() as name:
            folder = options.work or Path(name)
            found["measured"] = list(measure(folder))
            subjects = {stage: build(recipe_of(folder, stage, "run"), gpu_named(GPU)).subject for stage in STAGES}
        found["check"] = compare(found["measured"], subjects)
    else:
        say(f"scaling_model: nothing is measured: {reason}")
    if options.steps_from is not None:
        earlier = json.loads(options.steps_from.read_text(encoding="utf-8"))
        found["rows"], found["strong"] = earlier["rows"], earlier["strong"]
    for plan in planned([case for case in CASES if case.name in options.models and options.steps_from is None]):
        found["rows"] += weak(plan)
        found["strong"] += strong(plan)
        say(f"scaling_model: {plan.case.name}, ZeRO-{plan.stage}: {plan.step(1).seconds:.3f} s a step on one GPU")
    first = [row for row in found["rows"] if row["zero_stage"] == STAGES[0]]
    found["failures"] = failures.rows(first)
    found["shards"] = archive.shards()
    found["demand"] = archive.demand(first)
    machine |= {"seconds": round(time.perf_counter() - begin)}
    write_json(options.out, machine, **found)
    options.out.with_suffix(".md").write_text(page(machine, found), encoding="utf-8")
    draw(found).savefig(options.out.with_suffix(".png"), dpi=110)
    say(f"scaling_model: wrote {options.out}, and .md and .png beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
