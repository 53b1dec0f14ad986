"""What a tracker must do, and what it is told about a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Outcome = Literal["finished", "stopped", "failed"]
"""How a run ended: with its last step, by a signal, a limit or a rule, or by an error."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told when it is opened."""

    folder: Path
    """The run directory."""
    project: str
    """`record.project`."""
    recipe: Mapping[str, Any]
    """Nested JSON values, without the passwords and tokens of addresses."""
    start: int
    """Number of steps that were taken before: records of later steps may have been sent by an earlier start."""
    known_as: str | None
    """What :attr:`Tracker.known_as` was at an earlier start of this run; None at the first."""

    @property
    def name(self) -> str:
        """The name that is shown: that of the run directory."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """A connection to one tracker. It lives in one thread: all its methods may block, and may raise anything.

    A class of this protocol is made with a :class:`TrackedRun`.
    """

    known_as: str
    """The name or id by which the tracker finds this run again."""

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        """Send, or keep until :meth:`flush`, the figures of one record, by their names (:func:`figures_of`).

        If it raises, this record is lost, and none of those before.
        """

    def flush(self) -> None:
        """Send what is kept; if it raises, all records since the last call are lost.

        It is called where nothing waits, and at the latest after `sending.MOST_UNFLUSHED` records.
        """

    def close(self, outcome: Outcome) -> None:
        """No more will be sent."""


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite figures of a record of `metrics.jsonl`, named by what they are of.

    `train/loss`, `train/skipped/not_an_image`, `dev/ema/miou`, `checkpoint/write_s`.
    """
    kind = record["kind"]
    prefix = f"{record['split']}/{record['weights']}" if kind == "eval" else str(kind)
    return dict(_numbers({key: value for key, value in record.items() if key != "step"}, prefix))


def _numbers(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and math.isfinite(value):
            found.append((f"{prefix}/{key}", float(value)))
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys, as on the command line."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
