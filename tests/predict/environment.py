"""The environment of processes that these tests start."""

from __future__ import annotations

import os

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def without_ranks() -> dict[str, str]:
    """This process's environment without what an in-process run, or a launcher, has set."""
    return {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
