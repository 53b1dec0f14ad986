"""What the ranks of a job tell each other about a checkpoint: how their parts went, and how it all ended.

Decision: docs/decisions/0045-checkpoints-written-in-the-background.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

_LONGEST_PAUSE_S = 0.5


class Store(Protocol):
    """What is used of torch's `Store`. Only the thread that writes calls it."""

    def set(self, key: str, value: str) -> None:
        """Write a value for all ranks."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of the keys were written."""

    def get(self, key: str) -> bytes:
        """The value of a key that was written."""

    def delete_key(self, key: str) -> bool:
        """Remove a key."""


class Reports:
    """Reports of the ranks on one checkpoint, through a store that all of them reach.

    Args:
        store: of all ranks.
        number: of the checkpoint among those of the process: the same on every rank, and never used twice.
    """

    def __init__(self, store: Store, number: int) -> None:
        self._store, self._prefix = store, f"checkpoint/{number}"

    def tell(self, who: int | str, report: dict[str, Any]) -> None:
        """Write the report of a rank, or of the whole under another name; a lost store is left to who reads."""
        try:
            self._store.set(f"{self._prefix}/{who}", json.dumps(report))
        except RuntimeError:  # the store's process has ended
            return

    def hear(
        self, who: Sequence[int | str], timeout_s: float, *, remove: bool = False
    ) -> dict[int | str, dict[str, Any]]:
        """Wait for reports.

        Args:
            who: whose.
            timeout_s: after so many seconds it gives those that are there.
            remove: whether to remove them from the store: nobody else hears them.

        Returns:
            The reports that came, by who wrote them.
        """
        found: dict[int | str, dict[str, Any]] = {}
        until, pause_s = time.monotonic() + timeout_s, 0.01
        while True:
            for one in who:
                if one not in found and (text := self._look(one, remove=remove)) is not None:
                    found[one] = json.loads(text)
            if len(found) == len(who) or time.monotonic() >= until:
                return found
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _look(self, who: int | str, *, remove: bool) -> bytes | None:
        key = f"{self._prefix}/{who}"
        try:
            text = self._store.get(key) if self._store.check([key]) else None
            if text is not None and remove:
                self._store.delete_key(key)
            return text
        except RuntimeError:  # the store's process has ended
            return json.dumps({"error": "rank 0 has ended"}).encode()
