"""MLflow, at the address that MLFLOW_TRACKING_URI names, or in its local store in the working directory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from maskmatch_scale.record.trackers.protocol import Outcome, TrackedRun, flat

T = TypeVar("T")

MOST_PARAMS, MOST_METRICS = 100, 1000
"""What MLflow takes in one request."""
LONGEST_PARAM = 500
"""Characters of a value that every MLflow server takes."""
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""MLflow's words for :data:`Outcome`."""


class Mlflow:
    """One run of MLflow over all starts, without its global state: a script that trains may use MLflow itself.

    Keys of the recipe are parameters of the first start. MLflow does not let them change.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._client = MlflowClient()
        self._waiting: list[Metric] = []
        if run.known_as is None:
            self.known_as = self._create(run)
        else:
            self.known_as = run.known_as
            self._client.update_run(self.known_as, status="RUNNING")

    def _create(self, run: TrackedRun) -> str:
        found = self._client.get_experiment_by_name(run.project)
        experiment = self._client.create_experiment(run.project) if found is None else found.experiment_id
        created: str = self._client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(key, json.dumps(value)[:LONGEST_PARAM]) for key, value in flat(run.recipe).items()]
        for some in _batches(params, MOST_PARAMS):
            self._client.log_batch(created, params=some)
        return created

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep the figures for a request of many."""
        now_ms = round(1000 * time.time())
        self._waiting += [Metric(name, value, now_ms, step) for name, value in figures.items()]

    def flush(self) -> None:
        """Send what is kept. If that fails, it is lost."""
        waiting, self._waiting = self._waiting, []
        for some in _batches(waiting, MOST_METRICS):
            self._client.log_batch(self.known_as, metrics=some)

    def close(self, outcome: Outcome) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self.known_as, _STATUS[outcome])


def _batches(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]
