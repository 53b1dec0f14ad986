"""Kinds of values in a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

SEGMENTER_FILE = "segmenter.json"
"""Every folder that `maskmatch export` writes has this file, and no other folder has. `model.pretrained` and
`method.teacher` may name such a folder."""


def _pair(value: object) -> object:
    """One number becomes the two sides of a square; a list becomes a tuple, which strict typing requires."""
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the first number must not be larger than the second")
    return value


def _frozen(value: object) -> object:
    if value is None or value == "backbone" or (type(value) is int and value >= 1):
        return value
    raise ValueError("it must be null, backbone, or a number of layers from 1 on")


def shard_ranges(text: str) -> tuple[range, ...]:
    """The numbers of shards that a text like `0-9,20` names.

    Raises:
        ValueError: it is not like that; says how it is written.
    """
    parts = [re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part) for part in text.split(",")]
    ranges = tuple(range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part is not None)
    if len(ranges) < len(parts) or not all(ranges):
        raise ValueError("numbers of shards are written as 0-999, or 0-9,20; each range from the smaller to the larger")
    return ranges


def _as_text(value: object) -> object:
    """YAML takes a single number for one."""
    return str(value) if type(value) is int else value


Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Shards = Annotated[str, BeforeValidator(_as_text)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
BadSamples = Literal["fail", "skip"]
SidesPx = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], BeforeValidator(_pair)]
StepRange = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], AfterValidator(_ascending)]
StopSignal = Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU"]
Frozen = Annotated[Literal["backbone"] | Annotated[int, Field(ge=1)] | None, BeforeValidator(_frozen)]
ScaleRange = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
