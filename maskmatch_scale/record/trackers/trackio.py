"""Trackio: a local store (`trackio show`), or the Space or server that its variables name."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import uuid4

import trackio

from maskmatch_scale.record.trackers.protocol import Outcome, TrackedRun, flat


class Trackio:
    """One run of Trackio over all starts. Trackio finds runs again by their names, so each has a name of its own."""

    def __init__(self, run: TrackedRun) -> None:
        self.known_as = run.known_as or f"{run.name}-{uuid4().hex[:6]}"
        self._run = trackio.init(
            project=run.project, name=self.known_as, config=flat(run.recipe), resume="allow", embed=False
        )

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step."""
        self._run.log(dict(figures), step=step)

    def flush(self) -> None:
        """Nothing: trackio's own thread sends."""

    def close(self, outcome: Outcome) -> None:
        """Finish the run. Trackio has no word for how."""
        self._run.finish()
