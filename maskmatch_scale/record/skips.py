"""Samples that training passed over: listed in `RUN/skipped/rank-N.jsonl`, counted over all ranks, and not too many."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

IMAGES_BEFORE_A_SHARE = 1000
"""The share counts as if at least so many images had been read: a few among the first are no share yet."""


class Skips:
    """What one rank lists, and what all of them count alike.

    Args:
        path: this rank's list; made with the first entry.
        reasons: in the order of the counts.
        limit: largest share of the images read, 0–1.
        counts: `images_read` and `images_skipped` that a continued run begins with.
    """

    def __init__(self, path: Path, reasons: Sequence[str], limit: float, counts: Mapping[str, Any]) -> None:
        self.path = path
        self.limit = limit
        self.read = int(counts.get("images_read", 0))
        self.skipped = int(counts.get("images_skipped", 0))
        self._reasons = list(reasons)

    @property
    def counts(self) -> dict[str, int]:
        """For the checkpoint: images read and skipped by all ranks."""
        return {"images_read": self.read, "images_skipped": self.skipped}

    def add(self, step: int, skipped: Sequence[Any]) -> list[int]:
        """List what this rank skipped for a step: dataclasses with a `reason`, and whatever else names the sample.

        Returns:
            How many there are of each reason.
        """
        counts = [0] * len(self._reasons)
        for skip in skipped:
            counts[self._reasons.index(skip.reason)] += 1
        if skipped:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(json.dumps({"step": step, **asdict(skip)}) + "\n" for skip in skipped)
        return counts

    def count(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add what train records say of all ranks."""
        for record in records:
            self.skipped += sum(record.get("skipped", {}).values())

    @property
    def too_many(self) -> str | None:
        """A sentence, if more were skipped than the limit."""
        if self.skipped <= self.limit * max(self.read, IMAGES_BEFORE_A_SHARE):
            return None
        return (
            f"{self.skipped} samples were skipped, {self.read} used ({self.skipped / max(self.read, 1):.2%}; "
            f"data.max_bad_share={self.limit}); {self.path.parent} lists them with their reasons. Mend the shards or "
            "raise the limit, then continue with --resume auto"
        )
