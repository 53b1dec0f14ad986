"""The table of the drill: its rows, and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import describe_machine, markdown, write_json

SOURCES = ("benchmarks/drill", "benchmarks/small_runs.py", "benchmarks/harness.py", "tests/conftest.py",
           "tests/data/faulty_server.py", "maskmatch_scale")  # fmt: skip
COLUMNS = ("phase", "case", "faults", "survived", "steps", "steps again", "samples lost", "samples repeated",
           "losses", "weights", "processes left", "met")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What one kind of fault did."""

    phase: str
    case: str
    faults: int
    """Faults given."""
    survived: int
    """Faults after which everything was as it should be: processes ended, codes, lines, and the run went on."""
    steps: int | None = None
    """Steps of the run."""
    steps_again: int | None = None
    """Steps that were taken more than once."""
    lost: int | None = None
    """Samples of finished epochs that were in no step that counts."""
    repeated: int | None = None
    """How often a sample came a second time in its epoch."""
    moved_steps: int | None = None
    """Steps that had other samples than in the run that nothing happened to."""
    losses: float | None = None
    """Largest relative difference of a step's loss from that run's."""
    weights: float | None = None
    """Relative difference of weights, moments and teacher from that run's, all elements together; 0: all bits are the
    same."""
    outlived: int | None = None
    """Processes that still lived 5 s after their session had ended by itself."""
    tolerance: float = 0.0
    """Largest difference of losses that is right. At 0 weights must be identical too."""
    may_lose: int = 0
    """How many samples may be lost, and as many repeated. Above 0 the run is not asked to be as the other."""
    note: str = ""
    """What else is to be said."""
    skipped: str = ""
    """Why nothing was done."""

    @property
    def met(self) -> bool:
        """Whether all is as it should be; a row that was skipped is not held against it."""
        if self.skipped:
            return True
        if self.survived != self.faults or self.outlived or max(self.lost or 0, self.repeated or 0) > self.may_lose:
            return False
        exact = self.tolerance > 0 or not self.weights
        return self.may_lose > 0 or (exact and (self.losses or 0.0) <= self.tolerance)

    def shown(self) -> dict[str, Any]:
        """For the table."""
        return {
            "phase": self.phase,
            "case": f"{self.case}{f' ({self.note})' if self.note else ''}",
            "faults": self.faults,
            "survived": self.survived,
            "steps": self.steps,
            "steps again": self.steps_again,
            "samples lost": self.lost,
            "samples repeated": self.repeated,
            "losses": _difference(self.losses),
            "weights": _difference(self.weights),
            "processes left": self.outlived,
            "met": f"skipped: {self.skipped}" if self.skipped else "yes" if self.met else "no",
        }


def _difference(value: float | None) -> str | None:
    return None if value is None else "identical" if value == 0 else f"{value:.1e}"


def earlier_rows(out: Path, phases: Sequence[str]) -> list[Row]:
    """The rows of other phases than those that are run now, of a file that is there already."""
    if not out.is_file():
        return []
    read = json.loads(out.read_text(encoding="utf-8"))["rows"]
    rows = [Row(**{name: value for name, value in row.items() if name != "met"}) for row in read]
    return [row for row in rows if row.phase not in phases]


def write_report(out: Path, rows: Sequence[Row], seed: int) -> None:
    """Write the rows, and a table beside them."""
    machine = describe_machine(torch.device("cpu"), SOURCES) | {"seed": seed}
    write_json(out, machine, [asdict(row) | {"met": row.met} for row in rows])
    page = markdown("Faults given to real runs, and what was lost", machine, [row.shown() for row in rows], COLUMNS)
    out.with_suffix(".md").write_text(page, encoding="utf-8")
