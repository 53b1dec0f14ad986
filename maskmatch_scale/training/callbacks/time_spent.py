"""The time that a run has taken since its first start, over all restarts."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from maskmatch_scale.training.callbacks.base import Callback


class TimeSpent(Callback):
    """Counts wall seconds, and CPU seconds of all ranks."""

    def started(self) -> None:
        """Start counting."""
        self._before = {name: float(self.run.resumed.get(name, 0.0)) for name in ("seconds", "cpu_s")}
        self._began, self._cpu_began = time.monotonic(), _cpu_s()

    def state(self) -> dict[str, Any]:
        """`seconds`, and `cpu_s` summed over ranks; all ranks call it together."""
        runtime = self.run.runtime
        cpu_s = torch.tensor([_cpu_s() - self._cpu_began], dtype=torch.float64, device=runtime.device)
        return {
            "seconds": self._before["seconds"] + time.monotonic() - self._began,
            "cpu_s": self._before["cpu_s"] + float(runtime.sum_over_ranks(cpu_s)),
        }


def _cpu_s() -> float:
    """CPU seconds of this process and of the loader processes that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
