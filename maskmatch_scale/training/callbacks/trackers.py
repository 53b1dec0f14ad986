"""Sends every record of `metrics.jsonl` to the trackers that the recipe names: rank 0, from threads of their own.

Decision: docs/decisions/0052-trackers-in-threads.md.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from functools import partial
from importlib import import_module

from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.files import write_whole
from maskmatch_scale.recipe.trackers import TRACKERS
from maskmatch_scale.record.trackers.protocol import Outcome, TrackedRun, Tracker
from maskmatch_scale.record.trackers.sending import Sender
from maskmatch_scale.redact import redacted_values
from maskmatch_scale.training.callbacks.base import Callback
from maskmatch_scale.training.run import Run

CLOSING_S = 10.0
"""How long the end of a run waits for all trackers together."""

log = logging.getLogger("maskmatch_scale")


class Trackers(Callback):
    """Opens the trackers of `record.trackers` on rank 0; idle on other ranks, and if the recipe names none.

    A run that goes on in its directory goes on in the trackers: `trackers.json` says under what names. It is not in the
    checkpoints, from which another run may start.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._senders: list[Sender] = []
        self._names: dict[str, str] = {}
        self._naming = threading.Lock()

    def started(self) -> None:
        """Open the trackers, each in its thread; nothing here waits for them."""
        run = self.run
        if run.runtime.rank != 0 or not run.recipe.record.trackers:
            return
        if run.folder.trackers.is_file():
            self._names = json.loads(run.folder.trackers.read_text(encoding="utf-8"))
        recipe = redacted_values(run.recipe.model_dump(mode="json"))
        for name in run.recipe.record.trackers:
            tracked = TrackedRun(run.folder.path, run.recipe.record.project, recipe, run.start, self._names.get(name))
            self._senders.append(Sender(name, partial(_open, name, tracked), partial(self._note, name)))
        run.metrics.readers += [sender.put for sender in self._senders]

    def between_steps(self, done: int) -> None:
        """Show what came up."""
        self._say()

    def ended(self) -> None:
        """Close the trackers if an error is on its way: :meth:`finished` will not be called then."""
        error = sys.exc_info()[1]
        if error is not None:
            self._close("stopped" if isinstance(error, TrainingStopped) else "failed")

    def finished(self) -> None:
        """Close the trackers."""
        self._close("finished")

    def _close(self, outcome: Outcome) -> None:
        for sender in self._senders:
            sender.end(outcome)
        deadline = time.monotonic() + CLOSING_S
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))
        self._say()
        self._senders.clear()

    def _say(self) -> None:
        for sender in self._senders:
            for line in sender.news():
                self.run.say(line)

    def _note(self, name: str, known_as: str) -> None:
        with self._naming:
            self._names[name] = known_as
            try:
                write_whole(self.run.folder.trackers, json.dumps(self._names, indent=1))
            except OSError as error:  # a start that continues the run then begins another one there
                log.warning("%s cannot be written: %s", self.run.folder.trackers, error)


def _open(name: str, run: TrackedRun) -> Tracker:
    module, _, kind = TRACKERS[name].implementation.partition(":")
    tracker: Tracker = getattr(import_module(module), kind)(run)
    return tracker
