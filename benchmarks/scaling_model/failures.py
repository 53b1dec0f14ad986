"""Failures and checkpoints: how often something breaks, what a checkpoint costs, and how often one should be written.

The rate is that of the Llama 3 report (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on
16,384 H100s. Intervals: Young (1974), Daly (2006).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from maskmatch_scale.planning import efficiency

INTERRUPTIONS, DAYS, THEIR_GPUS = 419, 54, 16_384
HOURS_OF_A_GPU = DAYS * 24 * THEIR_GPUS / INTERRUPTIONS
"""Between two failures of one GPU with its share of host and network."""
BYTES_A_PARAMETER = 16
"""Of a checkpoint: masters, two moments, the teacher's average (docs/resume.md)."""
STORE_BYTES_S = 2e9
"""Bytes/s that a host writes to a shared file system. An assumption."""
STORE_LIMIT_BYTES_S = 100e9
"""Bytes/s of that file system, for all hosts together. An assumption."""
DELAY_S = 1.0
"""Seconds that the steps wait for a checkpoint besides its copy: ranks agree, memory is taken. An assumption."""
CLOSING_S = 10.0
"""Seconds of a checkpoint besides its bytes: files opened by every rank, flushed, renamed. An assumption."""
RESTART_S = 600.0
"""From a failure to the first step after it: noticing, the scheduler, starting processes, reading. An assumption."""


def hours_between_failures(gpus: int) -> float:
    """Of a job of so many GPUs, any of which ends it."""
    return HOURS_OF_A_GPU / gpus


def copy_s(parameters: int, gpus: int) -> float:
    """Seconds that the steps wait: every rank copies its share to its host's memory."""
    return DELAY_S + BYTES_A_PARAMETER * parameters / gpus / efficiency.HOST_LINK


def write_s(parameters: int, gpus: int, gpus_per_host: int = 8) -> float:
    """Seconds until a checkpoint is complete, while the steps go on."""
    hosts = max(1, gpus // gpus_per_host)
    return CLOSING_S + BYTES_A_PARAMETER * parameters / min(hosts * STORE_BYTES_S, STORE_LIMIT_BYTES_S)


def interval_s(cost_s: float, between_s: float) -> float:
    """Seconds of training between two checkpoints, Daly's higher-order estimate.

    Args:
        cost_s: that a checkpoint delays the steps.
        between_s: mean time between failures.
    """
    if cost_s >= 2 * between_s:
        return between_s
    half = cost_s / (2 * between_s)
    return math.sqrt(2 * cost_s * between_s) * (1 + math.sqrt(half) / 3 + half / 9) - cost_s


def lost_share(interval: float, cost_s: float, writing_s: float, between_s: float) -> float:
    """Share of the time that is no progress, to first order.

    Checkpoints, and with each failure half an interval, the writing that was not complete, and the restart.
    """
    return cost_s / (interval + cost_s) + (interval / 2 + writing_s + RESTART_S) / between_s


def rows(weak: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each row of weak scaling."""
    found = []
    for row in weak:
        gpus, parameters, step_s = row["gpus"], row["parameters"], row["step_s"]
        cost, writing = copy_s(parameters, gpus), write_s(parameters, gpus)
        between = 3600 * hours_between_failures(gpus)
        # A checkpoint is not begun before the one before is complete.
        interval = max(interval_s(cost, between), writing)
        found.append(
            {
                "model": row["model"],
                "gpus": gpus,
                "checkpoint_gb": BYTES_A_PARAMETER * parameters / 1e9,
                "copy_s": cost,
                "write_s": writing,
                "hours_between_failures": between / 3600,
                "interval_s": interval,
                "interval_steps": max(1, round(interval / step_s)),
                "lost": lost_share(interval, cost, writing, between),
                "lost_at_1000_steps": lost_share(1000 * step_s, cost, writing, between),
            }
        )
    return found
