"""`metrics.jsonl`: one JSON object for each record. Figures stay on the device until a flush; no step waits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskmatch_scale.record.lines import LinesFile


class MetricsLog:
    """Collects the records of a run and writes them.

    Args:
        path: `RUN/metrics.jsonl`, to which records are appended. None on ranks that do not write.
        say: tells the user that records cannot be written, and wait.
    """

    def __init__(self, path: Path | None, say: Callable[[str], None]) -> None:
        self.file = None if path is None else LinesFile(path, say)
        """Where records are written; None on ranks that do not write."""
        self.readers: list[Callable[[Sequence[Mapping[str, Any]]], None]] = []
        """Are given all records in the order in which they are written, on ranks that write."""
        self._waiting: list[tuple[dict[str, Any], dict[str, Tensor], dict[str, Callable[[], float]]]] = []

    def train(
        self,
        step: int,
        figures: Mapping[str, float | bool | None],
        on_device: Mapping[str, Tensor],
        later: Mapping[str, Callable[[], float]] = {},
    ) -> None:
        """Keep one step's record until the next :meth:`flush`.

        Args:
            step: number of steps taken.
            figures: figures that are known already.
            on_device: scalars that are read at the flush. Those called `group/name` are counts: those above 0 become
                integers in an object `group`, which is left out if there are none.
            later: functions for figures that are known when the device has done the step, such as its times.
        """
        record = {"step": step, "kind": "train", **figures}
        self._waiting.append((record, {name: value.double() for name, value in on_device.items()}, dict(later)))

    def flush(self) -> list[dict[str, Any]]:
        """Read the waiting figures from the device in one transfer, write their records, and return them."""
        if not self._waiting:
            return []
        # Steps have different figures: in the burn-in there is no unlabelled loss.
        values = iter(torch.stack([value for _, waiting, _ in self._waiting for value in waiting.values()]).tolist())
        records = [
            _grouped(record | {name: next(values) for name in waiting} | {name: ask() for name, ask in later.items()})
            for record, waiting, later in self._waiting
        ]
        self._waiting.clear()
        self._write(records)
        return records

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the waiting records, and then one more at once."""
        self.flush()
        self._write([dict(record)])

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one record at once. The waiting ones stay on the device."""
        self._write([dict(record)])

    def _write(self, records: list[dict[str, Any]]) -> None:
        if self.file is not None:
            plain = [_plain(record) for record in records]
            self.file.append([json.dumps(record) for record in plain])
            for read in self.readers:
                read(plain)


def _grouped(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the figures called `group/name` moved into objects, if they are above 0."""
    result: dict[str, Any] = {}
    for name, value in record.items():
        group, slash, member = name.partition("/")
        if not slash:
            result[name] = value
        elif value:
            result.setdefault(group, {})[member] = int(value)
    return result


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with null in place of values that are not finite, since JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
