"""The list of all cases beside their results: what was written, and what was left out and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case
from benchmarks.gpu.measure import Outcome
from benchmarks.harness import markdown, write_json

COLUMNS = ("case", "status", "gpu", "commit", "seconds", "estimate_s", "reason")
OF_A_RUN = ("gpu", "commit", "date")
"""Facts of the machine that a row keeps: cases of one list may be written by several calls."""


def row(case: Case, outcome: Outcome, estimate_s: float, machine: Mapping[str, Any]) -> dict[str, Any]:
    """A case, how it ended, and by which call."""
    return {
        "case": case.name,
        "status": outcome.status,
        "seconds": round(outcome.seconds, 1),
        "estimate_s": round(estimate_s, 1),
        "reason": outcome.reason,
        **vars(case),
        **{fact: machine[fact] for fact in OF_A_RUN},
    }


def written_before(folder: Path) -> dict[str, dict[str, Any]]:
    """Case → its row, of the cases that an earlier call has written and whose results are still there."""
    file = folder / "cases.json"
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    of_all = {fact: content["machine"][fact] for fact in OF_A_RUN}
    return {
        entry["case"]: of_all | entry
        for entry in content["rows"]
        if entry["status"] == "written" and (folder / f"{entry['case']}.json").is_file()
    }


def write_list(folder: Path, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `cases.json` and `cases.md`."""
    write_json(folder / "cases.json", machine, rows)
    page = markdown("Benchmarks on a GPU: what was run", machine, rows, COLUMNS)
    (folder / "cases.md").write_text(page, encoding="utf-8")
