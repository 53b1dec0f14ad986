"""The list of all cases beside their results: what was written, and what was left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case
from benchmarks.gpu.measure import Outcome
from benchmarks.harness import markdown, write_json

COLUMNS = ("case", "status", "seconds", "estimate_s", "reason")


def row(case: Case, outcome: Outcome, estimate_s: float) -> dict[str, Any]:
    """A case and how it ended."""
    return {
        "case": case.name,
        "status": outcome.status,
        "seconds": round(outcome.seconds, 1),
        "estimate_s": round(estimate_s, 1),
        "reason": outcome.reason,
        **vars(case),
    }


def write_list(folder: Path, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `cases.json` and `cases.md`."""
    write_json(folder / "cases.json", machine, rows)
    page = markdown("Benchmarks on a GPU: what was run", machine, rows, COLUMNS)
    (folder / "cases.md").write_text(page, encoding="utf-8")
