"""The command line: ``python -m benchmarks.gpu --out FOLDER --minutes N``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import GPU_CASES, TOY_CASES
from benchmarks.gpu.measure import Outcome, run_case
from benchmarks.gpu.report import row, write_list, written_before
from benchmarks.harness import check_out, describe_machine, say
from maskmatch_scale.device_peaks import peak_tflops

SOURCES = ("maskmatch_scale", "benchmarks")
LEAST_LIMIT_S = 60.0
"""A case may take three times its estimate, and at least so many seconds, if there is time."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description="Runs masked_vs_full, train_step and engine_overhead on a GPU, most wanted first, until the time "
        "is over. Each writes its own files as it goes; cases.md lists what was run and what was left out. A case that "
        "an earlier call has written is not run again, unless --only names it; so a later call goes on where the time "
        "of an earlier one was over. On a CPU the same commands run at toy sizes, which measures nothing and shows "
        "that they work.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="results: NAME.json, .md and .png, and cases.md")
    add("--minutes", type=float, default=16.0, metavar="N", help="time in all; default 16")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="default cuda")
    add("--only", nargs="+", metavar="TEXT", help="cases whose name contains one of these")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; 0, 1 if one failed, 2 for a mistake or where there is no GPU."""
    options = parse(arguments)
    out: Path = options.out
    began = time.monotonic()
    cases = [
        case
        for case in (GPU_CASES if options.device == "cuda" else TOY_CASES)
        if options.only is None or any(text in case.name for text in options.only)
    ]
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: there is no GPU here; --device cpu runs the same commands at toy sizes")
        if not options.minutes > 0:
            raise ValueError(f"--minutes: {options.minutes}; it must be above 0")
        if not cases:
            raise ValueError(f"--only: no case is named like {' or '.join(options.only)}")
        check_out(out / "cases.json")
    except ValueError as error:
        say(f"gpu: {error}")
        return 2
    device = torch.device(options.device)
    budget_s = 60 * options.minutes
    peak = peak_tflops(device, torch.bfloat16)
    machine = describe_machine(device, SOURCES) | {"deepspeed": version("deepspeed"), "minutes": options.minutes}
    before, ends = written_before(out), list[str]()
    rows: dict[str, dict[str, Any]] = dict(before)
    if options.only is None:
        cases = [case for case in cases if case.name not in before]
    for number, case in enumerate(cases, 1):
        estimate_s = case.estimate_s(peak)
        left_s = budget_s - (time.monotonic() - began)
        if estimate_s > left_s and device.type == "cuda":
            outcome = Outcome("left out", 0.0, f"about {estimate_s:.0f} s, and {max(0.0, left_s):.0f} s were left")
        elif left_s <= 0:
            outcome = Outcome("left out", 0.0, "no time was left")
        else:
            limit_s = left_s
            if device.type == "cuda":  # the estimate is for a GPU
                limit_s = min(left_s, max(LEAST_LIMIT_S, 3 * estimate_s))
            say(f"{_clock(began)}: {case.name}, case {number} of {len(cases)}, about {estimate_s:.0f} s")

            def minute(spent_s: float, name: str = case.name) -> None:
                say(f"{_clock(began)}: {name} has run for {spent_s:.0f} s")

            outcome = run_case(case, options.device, out / f"{case.name}.json", limit_s, minute)
        if outcome.status == "written" or case.name not in before:
            rows[case.name] = row(case, outcome, estimate_s, machine)
        ends.append(outcome.status)
        write_list(out, machine, list(rows.values()))
        say(f"{_clock(began)}: {case.name}: {outcome.status}{f', {outcome.reason}' if outcome.reason else ''}")
    done = ", ".join(f"{ends.count(status)} {status}" for status in dict.fromkeys(ends)) or "all were written before"
    say(f"{done}; {out / 'cases.md'}")
    return int("failed" in ends)


def _clock(began: float) -> str:
    spent = int(time.monotonic() - began)
    return f"{spent // 60}:{spent % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
