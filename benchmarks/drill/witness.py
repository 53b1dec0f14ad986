"""What a rank notes while it trains: the steps it takes, evaluations, and which sample was read for which micro-batch.

A note is one line of JSON, appended in one write, so that a kill leaves whole lines. It has `session`, `rank`, `what`,
and by `what`:

- `begins`: the run is built. `start`: steps taken before; `world_size`; `accumulation`; `process`
- `read`: a loader process has made a micro-batch. `number`; `samples`: [source, epoch, key] of each
- `step`: a step was taken. `step`: its number, from 1
- `evaluates`, `evaluated`: an evaluation begins after `step`, and has ended
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.order.queue import SamplePlace
from maskmatch_scale.data.order.source import WeightedSource
from maskmatch_scale.training.callbacks import Callback, Record
from maskmatch_scale.training.run import Run
from maskmatch_scale.training.step import StepFigures

NOTES, SESSION = "DRILL_NOTES", "DRILL_SESSION"
"""Environment variables: the file of the notes, and the number of the start."""


class Witness(Callback):
    """Notes what a rank does. It changes nothing of a run."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        engine = run.recipe.engine
        self._note(
            "begins",
            start=run.start,
            world_size=run.runtime.world_size,
            accumulation=engine.accumulation,
            process=os.getpid(),
        )
        run.batches = _Readings(run.batches, self._note)  # type: ignore[assignment]

    def after_step(self, done: int, figures: StepFigures) -> None:
        """Note the step."""
        self._note("step", step=done)

    def records_read(self, records: Sequence[Record]) -> None:
        """Note that an evaluation comes next, if it is due."""
        step = records[-1]["step"]
        if self.is_due(step, self.run.recipe.run.evaluate_every):
            self._note("evaluates", step=step)

    def evaluated(self, record: Record) -> None:
        """Note its end."""
        self._note("evaluated", step=record["step"])

    def _note(self, what: str, **facts: Any) -> None:
        session = int(os.environ[SESSION])
        line = json.dumps({"session": session, "rank": self.run.runtime.rank, "what": what, **facts}) + "\n"
        file = os.open(os.environ[NOTES], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


class _Readings:
    """The training batches of a rank, which note the samples that they are made of, in whatever process that is."""

    def __init__(self, made: TrainingBatches, note: Callable[..., None]) -> None:
        self._made, self._note = made, note
        self._read: list[tuple[str, int, str]] = []
        for side in (made.labelled, made.unlabelled):
            for source in side.sources if side is not None else ():
                source.load = self._noting(source)  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    def __getitem__(self, number: int) -> Batch:
        return self.make(number)

    def make(self, number: int, memory: Batch | None = None) -> Batch:
        self._read.clear()
        batch = self._made.make(number, memory)
        self._note("read", number=number, samples=self._read)
        return batch

    def _noting(self, source: WeightedSource) -> Callable[..., Any]:
        load = source.load

        def noting(place: SamplePlace, prepare: Callable[..., Any]) -> Any:
            keys: list[str] = []

            def prepare_noted(raw: Any) -> Any:
                keys.append(raw.key)
                return prepare(raw)

            loaded = load(place, prepare_noted)
            self._read.append((source.name, place.epoch, keys[-1]))  # the last one tried is the one that could be used
            return loaded

        return noting
