"""The command line: ``python -m benchmarks.plan_vs_measured --out FILE.json``; starts two ranks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.harness import ROOT, check_out, describe_machine, launch, say, write_json
from benchmarks.plan_vs_measured.cases import RANKS, cases
from benchmarks.plan_vs_measured.report import page, summary, with_plans
from maskmatch_scale.planning.measured import read_measurement

SOURCES = ("benchmarks/plan_vs_measured", "benchmarks/harness.py", "maskmatch_scale")


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch, compare, and write JSON and Markdown."""
    parser = argparse.ArgumentParser("python -m benchmarks.plan_vs_measured", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="a .md is written beside it")
    parser.add_argument(
        "--measured",
        type=Path,
        default=ROOT / "benchmarks/results/machine_cpu.json",
        metavar="FILE",
        help="of `maskmatch plan --measure` on this machine: what seconds are planned by",
    )
    parser.add_argument("--quick", action="store_true", help="one case for each family and stage")
    options = parser.parse_args(arguments)
    cpu = torch.device("cpu")
    try:
        check_out(options.out)
        machine = describe_machine(cpu, SOURCES) | {"ranks": RANKS, "threads": 1}
        chosen = [asdict(case) for case in cases(quick=options.quick)]
        measured = read_measurement(options.measured)
        rows = with_plans(launch("benchmarks.plan_vs_measured.worker", {"cases": chosen}, RANKS, cpu), measured)
    except (ValueError, RuntimeError) as error:
        say(f"plan_vs_measured: {error}")
        return 2
    write_json(options.out, machine, rows, summary=summary(rows))
    options.out.with_suffix(".md").write_text(page(machine, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
