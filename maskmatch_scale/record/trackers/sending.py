"""Sends records to one tracker from a thread of its own, which a run never waits for.

Decision: docs/decisions/0052-trackers-in-threads.md.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maskmatch_scale.record.trackers.protocol import Outcome, Tracker, figures_of
from maskmatch_scale.redact import redacted

MOST_WAITING = 10_000
"""Records that wait in memory for a slow tracker, about 1 kB each. Further ones are dropped."""
MOST_UNFLUSHED = 50
"""Records that a tracker is sent between two calls of its `flush`, where records always wait."""

_NO_ANSWER = "it did not answer"

log = logging.getLogger("maskmatch_scale")


class Sender:
    """Opens a tracker, sends it what it is given, and closes it, all in a daemon thread.

    Whatever the tracker raises, and however long it takes, does not reach the caller. Records that come before
    :meth:`start` wait.

    Args:
        name: of the tracker.
        connect: opens it.
        opened: is given :attr:`Tracker.known_as` once it is open, in the thread.
        most_waiting: number of records that may wait.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Tracker],
        opened: Callable[[str], None] = lambda _: None,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._name = name
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._most = most_waiting
        self._changed = threading.Condition()
        self._outcome: Outcome | None = None
        self._fault = ""
        self._news: list[str] = []
        self.lost = 0
        """Number of records that were dropped, or that the tracker did not take."""
        self._unflushed = 0
        """Number of records that were sent since the last flush, with the one that is being sent."""
        self._thread = threading.Thread(target=self._run, args=(connect, opened), name=f"tracker-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread, if it was not. If the system has none left, the tracker cannot be opened."""
        if self._thread.ident is None and self._most:
            try:
                self._thread.start()
            except RuntimeError as error:
                self._give_up(error)

    def put(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Leave records to the thread, and drop those that do not fit in the queue."""
        with self._changed:
            room = max(0, self._most - len(self._waiting))
            self._waiting.extend(records[:room])
            if len(records) > room:
                self._lose(len(records) - room, "it takes records more slowly than they come")
            self._changed.notify()

    def news(self) -> list[str]:
        """Lines for people who watch the run that came up since the last call."""
        with self._changed:
            lines, self._news = self._news, []
        return lines

    def end(self, outcome: Outcome) -> None:
        """Let the thread send what waits, and close the tracker."""
        with self._changed:
            self._outcome = outcome
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end after :meth:`end`, and give it up if that takes longer."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        with self._changed:
            if self._thread.is_alive():
                self.lost += len(self._waiting) + self._unflushed
                self._waiting.clear()
                self._news.append(f"tracker {self._name}: given up, it could not be closed in time")
            if self.lost:
                self._news.append(
                    f"tracker {self._name}: {self.lost} records did not reach it ({self._fault or _NO_ANSWER})"
                )

    def _run(self, connect: Callable[[], Tracker], opened: Callable[[str], None]) -> None:
        try:
            tracker = connect()
            opened(tracker.known_as)
        except BaseException as error:  # a library may even raise SystemExit
            self._give_up(error)
            return
        while (outcome := self._send_waiting(tracker)) is None:
            pass
        try:
            tracker.close(outcome)
        except BaseException as error:
            with self._changed:
                self._news.append(f"tracker {self._name}: could not be closed: {_explained(error)}")

    def _give_up(self, error: BaseException) -> None:
        with self._changed:
            self._lose(len(self._waiting), _explained(error))
            self._waiting.clear()
            self._most = 0
        log.warning("tracker %s could not be opened", self._name, exc_info=error)

    def _send_waiting(self, tracker: Tracker) -> Outcome | None:
        """Send what waits, then wait for more; the outcome when the run has ended and nothing waits."""
        with self._changed:
            is_due = not self._waiting or self._unflushed >= MOST_UNFLUSHED
            record = None if is_due else self._waiting.popleft()
            self._unflushed += record is not None
        fault = ""
        try:
            if record is None:
                tracker.flush()
            elif figures := figures_of(record):
                tracker.send(int(record["step"]), figures)
        except BaseException as error:
            fault = _explained(error)
        with self._changed:
            tried = self._unflushed if record is None else 1
            if fault:
                self._lose(tried, fault)
            if fault or record is None:
                self._unflushed -= tried
            if record is None and not self._waiting:
                if self._outcome is None:
                    self._changed.wait()
                if not self._waiting:
                    return self._outcome
        return None

    def _lose(self, count: int, why: str) -> None:
        """Count lost records; the first time it is said, and again only at the end."""
        self.lost += count
        if not self._fault:
            self._fault = why
            self._news.append(f"warning: tracker {self._name}: {why}; the run goes on without the records it loses")


def _explained(error: BaseException) -> str:
    text = " ".join(redacted(str(error)).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
