"""The tables of the drill of several hosts, and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import describe_machine, machine_line, markdown_table, write_json

SOURCES = ("benchmarks/drill_hosts", "benchmarks/small_runs.py", "benchmarks/harness.py", "tests/conftest.py",
           "maskmatch_scale")  # fmt: skip
_WITHIN_S = 60.0
"""How much later than `engine.collective_timeout_s` all must have ended; torch's own limit is that much longer."""


@dataclass(frozen=True)
class Cut:
    """What became of a run: on several hosts, and usually with one of them cut off."""

    case: str
    ranks: str
    """On which hosts: `1+1`."""
    launched_from: str
    lost: str | None
    """The host that was cut off, or whose processes were killed."""
    limit_s: float
    """engine.collective_timeout_s."""
    ended_s: float | None
    """When the launcher and all ranks had ended, after the cut; None: they were not to end."""
    named: bool | None
    """Whether a line that the launcher printed names the host; None: no line is to be printed."""
    went_on: bool
    """Whether it then ran to its last step."""
    steps: int
    losses: float
    """Largest relative difference of a step's loss from the run on one host that nothing happened to."""
    weights: float
    """Relative difference of weights, moments and teacher at the end; 0: all bits are the same."""
    left: int
    """Processes that had not ended by themselves."""
    tolerance: float = 0.0
    """Largest difference of losses that is right. At 0 weights must be identical too."""
    note: str = ""
    line: str = ""
    """What was printed of the host."""

    @property
    def met(self) -> bool:
        """Whether all is as it should be."""
        in_time = self.ended_s is None or self.ended_s <= self.limit_s + _WITHIN_S
        right = self.losses <= self.tolerance and (self.tolerance > 0 or self.weights == 0)
        return in_time and self.named is not False and self.went_on and right and self.left == 0

    def shown(self) -> dict[str, Any]:
        """For the table."""
        return {
            "case": f"{self.case}{f' ({self.note})' if self.note else ''}",
            "ranks": self.ranks,
            "launched from": self.launched_from,
            "lost": self.lost,
            "limit, s": self.limit_s,
            "ended after, s": self.ended_s,
            "host named": {True: "yes", False: "no", None: None}[self.named],
            "steps": self.steps,
            "losses": _difference(self.losses),
            "weights": _difference(self.weights),
            "processes left": self.left,
            "met": "yes" if self.met else "no",
        }


@dataclass(frozen=True)
class Link:
    """What stands between two hosts."""

    mbit: float | None = None
    """What each host may send, 10⁶ bits a second; None: no limit."""
    loss: float = 0.0
    """Share of packets that are dropped, 0–1."""
    single: bool = False
    """Packets of 9,000 bytes. By default up to 64 KiB cross a link of namespaces as one, and would be lost as one."""

    def shown(self) -> dict[str, Any]:
        """For the table."""
        return {
            "link, Mbit/s": "no limit" if self.mbit is None else f"{self.mbit:g}",
            "packets": "9 kB" if self.single else "to 64 KiB",
            "lost": f"{100 * self.loss:g} %",
        }


@dataclass(frozen=True)
class Steps:
    """Time of an optimizer step."""

    ranks: int
    hosts: int
    stage: int
    """engine.zero_stage."""
    link_mbit: float | None
    loss: float
    single_packets: bool
    """The link, as in :class:`Link`."""
    step_s: float
    """Median."""
    fastest_s: float
    counted: int
    """Steps."""
    bytes: int | None
    """Sent by all hosts a step, headers included; None: one host, which sends nothing."""
    parameters: int

    def shown(self) -> dict[str, Any]:
        """For the table."""
        return {
            "ranks": self.ranks,
            "hosts": self.hosts,
            "stage": self.stage,
            **Link(self.link_mbit, self.loss, self.single_packets).shown(),
            "step, s": self.step_s,
            "fastest, s": self.fastest_s,
            "steps": self.counted,
            "sent a step, MB": None if self.bytes is None else self.bytes / 1e6,
        }


@dataclass(frozen=True)
class Collective:
    """Time of an all-reduce of fp32 between two hosts, one rank each."""

    link_mbit: float | None
    loss: float
    single_packets: bool
    """The link, as in :class:`Link`."""
    bytes: int
    """Of the tensor."""
    seconds: float
    """Median."""

    def shown(self) -> dict[str, Any]:
        """For the table. With two ranks each sends a tensor's bytes once: half to be summed, half of the sum."""
        return {
            **Link(self.link_mbit, self.loss, self.single_packets).shown(),
            "tensor, MB": self.bytes / 1e6,
            "seconds": self.seconds,
            "Mbit/s each way": self.bytes * 8 / 1e6 / self.seconds,
        }


@dataclass
class Results:
    """All rows."""

    cuts: list[Cut] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)


_TABLES = (("cuts", "A host that is cut off"), ("steps", "Time of a step"), ("collectives", "All-reduce of two hosts"))


def write_report(out: Path, results: Results) -> None:
    """Write the rows, and tables beside them."""
    machine = describe_machine(torch.device("cpu"), SOURCES)
    rows: dict[str, list[dict[str, Any]]] = {
        "rows": [asdict(row) | {"met": row.met} for row in results.cuts],
        "steps": [asdict(row) for row in results.steps],
        "collectives": [asdict(row) for row in results.collectives],
    }
    write_json(out, machine, rows.pop("rows"), **rows)
    page = ["# Runs over several hosts, of namespaces of one machine", "", machine_line(machine), ""]
    for name, title in _TABLES:
        shown = [row.shown() for row in getattr(results, name)]
        if shown:
            page += [f"## {title}", "", markdown_table(shown, list(shown[0]))]
    lines = [row for row in results.cuts if row.line]
    if lines:
        page += ["## What was printed of the host", ""]
        page += [f"- {row.case}, {row.lost} lost: `{row.line}`" for row in lines] + [""]
    out.with_suffix(".md").write_text("\n".join(page), encoding="utf-8")


def earlier(out: Path, phases: Sequence[str]) -> Results:
    """The rows of other phases than those that are run now, of a file that is there already."""
    if not out.is_file():
        return Results()
    read = json.loads(out.read_text(encoding="utf-8"))
    cuts = [Cut(**{key: value for key, value in row.items() if key != "met"}) for row in read["rows"]]
    return Results(
        [] if "cuts" in phases else cuts,
        [] if "steps" in phases else [Steps(**row) for row in read["steps"]],
        [] if "collectives" in phases else [Collective(**row) for row in read["collectives"]],
    )


def _difference(value: float) -> str:
    return "identical" if value == 0 else f"{value:.1e}"
