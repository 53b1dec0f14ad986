"""The names of files in a checkpoint and beside it, and the error for one that cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

from maskmatch_scale.errors import UserError

FORMAT = 1
"""Of index.json. Checkpoints of before it have none."""

INDEX, STREAM, STATE = "index.json", "stream.json", "state.json"
LATEST, BEST = "latest", "best"
_STEP = re.compile(r"step-(\d+)")


class CheckpointError(UserError):
    """There is no checkpoint to continue from, or it does not fit the run; the message says what to do."""


def folder_name(step: int) -> str:
    """The folder that a checkpoint gets: `step-00000400`."""
    return f"step-{step:08d}"


def step_in_name(name: str) -> int | None:
    """The step that :func:`folder_name` has put into a name; None: it is another name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def writing(folder: Path) -> Path:
    """Where a checkpoint is while it is written."""
    return folder.with_name(f".{folder.name}.writing")


def part_name(rank: int, world_size: int) -> str:
    """The file of one rank."""
    return f"part-{rank:05d}-of-{world_size:05d}.safetensors"


def key(name: str, start: int) -> str:
    """The key of a piece in its file: name of the tensor, and place of the first element."""
    return f"{name}:{start}"
