"""The settings of what is being written to a folder, as long as it is not finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from maskmatch_scale.files import write_whole

PLAN_NAME = ".writing.json"
MERGING = "merging"
"""A setting of what is put together from other folders."""
FOLDERS = "folders"
"""The setting of merged data sets: those of each folder."""


def read_plan(out: Path) -> dict[str, object] | None:
    """The settings; None if nothing is under way."""
    path = out / PLAN_NAME
    if not path.exists():
        return None
    plan: dict[str, object] = json.loads(path.read_bytes())
    return plan


def write_plan(out: Path, settings: Mapping[str, object]) -> None:
    """Note the settings, before anything is written with them."""
    write_whole(out / PLAN_NAME, json.dumps(settings, indent=2))
