"""What a run fetches from other machines, and how much of it failed or was damaged in the cache."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import Any

import torch

from maskmatch_scale.data.remote.shard_cache import Fetched
from maskmatch_scale.training.callbacks.base import Callback
from maskmatch_scale.training.run import Run
from maskmatch_scale.training.step import StepFigures

_NAMES = tuple(field.name for field in fields(Fetched))


class Fetching(Callback):
    """Adds `fetched: {shards, mb, failed_tries, damaged, ranges, left_out}` of this rank to a step's figures, and
    totals of all ranks to the state.

    Rank 0 writes the record, so that the figures of a step are those of its own loader processes. The ranks of a
    machine share a cache: what another rank has fetched, rank 0 does not fetch.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        before = run.resumed.get("fetched", {})
        self._before = Fetched(**{name: before.get(name, 0) for name in _NAMES})
        self._now = Fetched()

    def after_step(self, done: int, figures: StepFigures) -> None:
        """Add what was fetched; figures that are 0 do not appear in the record."""
        fetched = figures.fetched
        self._now += fetched
        figures.known["fetched/shards"] = fetched.shards
        figures.known["fetched/mb"] = -(-fetched.bytes // 10**6)
        figures.known["fetched/failed_tries"] = fetched.failed_tries
        figures.known["fetched/damaged"] = fetched.damaged
        figures.known["fetched/ranges"] = fetched.ranges
        figures.known["fetched/left_out"] = fetched.left_out

    def state(self) -> dict[str, Any]:
        """`fetched`, summed over ranks and over all starts of the run; all ranks call it together."""
        runtime = self.run.runtime
        here = torch.tensor(astuple(self._now), dtype=torch.float64, device=runtime.device)
        now = runtime.sum_over_ranks(here).tolist()
        total = self._before + Fetched(*now)
        whole = {name: int(getattr(total, name)) for name in _NAMES if name != "seconds"}
        return {"fetched": whole | {"seconds": total.seconds}} if any(whole.values()) else {}
