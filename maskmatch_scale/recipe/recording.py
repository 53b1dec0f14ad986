"""The section `record` of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator

from maskmatch_scale.recipe.section import Section
from maskmatch_scale.recipe.tables import OneOf
from maskmatch_scale.recipe.trackers import TRACKERS


class RecordRecipe(Section):
    """Where else a run's figures go, and how often its report is written. `metrics.jsonl` is always there."""

    trackers: tuple[Annotated[str, BeforeValidator(OneOf(TRACKERS))], ...] = ()
    """Trackers that rank 0 sends all records to: of tensorboard, wandb, mlflow, trackio (docs/trackers.md). Each needs
    its library: pip install 'maskmatch_scale[NAME]'."""
    project: Annotated[str, Field(min_length=1)] = "maskmatch_scale"
    """The project (wandb, trackio) or experiment (mlflow) that the run belongs to. Its name there is that of
    `run.dir`."""
    report_every_s: Annotated[int, Field(ge=0)] = 60
    """While the run goes on, RUN/report.html is written again about this often, and a browser that shows it loads it
    again. It takes longer if that would cost more than a thirtieth of a core. 0 = only at the end."""

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a tracker is named twice")
        return value
