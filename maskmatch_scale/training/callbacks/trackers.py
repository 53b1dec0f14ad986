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
from pathlib import Path

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
        self._handled = sys.exc_info()[1]
        """An error that the caller of the run handles meanwhile, by which :meth:`ended` is not to be misled."""
        self._senders: list[Sender] = []
        self._names: dict[str, str] = {}
        self._naming = threading.Lock()
        if run.runtime.rank != 0 or not run.recipe.record.trackers:
            return
        self._names = _names_in(run.folder.trackers)
        recipe = redacted_values(run.recipe.model_dump(mode="json"))
        for name in run.recipe.record.trackers:
            tracked = TrackedRun(run.folder.path, run.recipe.record.project, recipe, run.start, self._names.get(name))
            self._senders.append(Sender(name, partial(_open, name, tracked), partial(self._note, name)))
        # Now, because other callbacks write records when they are started.
        run.metrics.readers += [sender.put for sender in self._senders]

    def between_steps(self, done: int) -> None:
        """Open the trackers after the first step, each in its thread, and show what came up; nothing here waits.

        By now the loader processes are there. One that is forked while a thread imports a library would wait for ever
        when it imports the same.
        """
        for sender in self._senders:
            sender.start()
        self._say()

    def ended(self) -> None:
        """Close the trackers if an error is on its way: :meth:`finished` will not be called then."""
        error = sys.exc_info()[1]
        if error is not None and error is not self._handled:
            self._close("stopped" if isinstance(error, TrainingStopped) else "failed")

    def finished(self) -> None:
        """Close the trackers."""
        self._close("finished")

    def _close(self, outcome: Outcome) -> None:
        for sender in self._senders:
            sender.start()  # of a run that ended in its first step
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


def _names_in(path: Path) -> dict[str, str]:
    """What `trackers.json` holds; nothing if it is not there or damaged: then the trackers begin another run."""
    if not path.exists():
        return {}
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError("not an object of names")
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); the trackers begin a new run each", path, error)
        return {}
    return names


def _open(name: str, run: TrackedRun) -> Tracker:
    module, _, kind = TRACKERS[name].implementation.partition(":")
    tracker: Tracker = getattr(import_module(module), kind)(run)
    return tracker
