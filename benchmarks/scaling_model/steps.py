"""Step times from 1 to 4,096 GPUs: weak scaling (as many images a GPU) and strong scaling (as many images a step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from benchmarks.scaling_model.cases import CLASSES, GPU, GPUS, STAGES, Case, cluster
from maskmatch_scale.planning.build import build
from maskmatch_scale.planning.hardware import gpu_named
from maskmatch_scale.planning.states import states
from maskmatch_scale.planning.step_time import StepTime, step_time
from maskmatch_scale.planning.subject import Subject

GLOBAL_BATCHES = (1024, 16384)
"""Labelled images of a step in strong scaling, and as many unlabelled ones."""


@dataclass(frozen=True, eq=False)
class SameStudent(Subject):
    """A subject that equals others with its student, so that their passes are traced once.

    Passes of a micro-batch are the same at every stage and accumulation, but for outputs that ZeRO-3 does not make
    again in the backward pass (`models/recompute.py`).
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameStudent) and self.student is other.student

    def __hash__(self) -> int:
        return id(self.student)


@dataclass(frozen=True)
class Planned:
    """A case at one ZeRO stage."""

    case: Case
    stage: int
    subject: Subject

    @property
    def parameters(self) -> int:
        """Of the student, context decoder included."""
        return sum(p.numel() for p in self.subject.student.parameters())

    def step(self, gpus: int, accumulation: int = 1) -> StepTime:
        """Of so many micro-batches."""
        return step_time(self._at(accumulation), cluster(gpus))

    def states_bytes(self, gpus: int) -> int:
        """Of a GPU, without activations: weights, optimizer, gradients, the average, buckets, gathered weights."""
        return sum(states(self._at(1), gpus)[0].by_name.values())

    def _at(self, accumulation: int) -> Subject:
        engine = {"zero_stage": self.stage, "accumulation": accumulation}
        own = self.subject.recipe
        recipe = own.model_copy(update={"engine": own.engine.model_copy(update=engine)})
        return replace(self.subject, recipe=recipe)


def planned(cases: Sequence[Case]) -> Iterator[Planned]:
    """Every case at every stage."""
    for case in cases:
        built = build(case.recipe(STAGES[0]), gpu_named(GPU), CLASSES).subject
        subject = SameStudent(**{field.name: getattr(built, field.name) for field in fields(built)})
        for stage in STAGES:
            yield Planned(case, stage, subject)


def weak(plan: Planned) -> list[dict[str, Any]]:
    """A row for each number of GPUs, every GPU with its micro-batch."""
    alone = plan.step(1).seconds
    rows = []
    for gpus in GPUS:
        step = plan.step(gpus)
        share = step.share_of()
        images = gpus * (plan.subject.labelled_images + plan.subject.unlabelled_images)
        rows.append(
            {
                "model": plan.case.name,
                "parameters": plan.parameters,
                "zero_stage": plan.stage,
                "gpus": gpus,
                "states_gb": plan.states_bytes(gpus) / 1e9,
                "step_s": step.seconds,
                "efficiency": alone / step.seconds,
                "images_per_s": images / step.seconds,
                "network_share": share["network"],
                "limit": max(share, key=lambda name: share[name]),
                "slowest_collective": max(step.network, key=lambda one: one.exposed_s).what if step.network else None,
                "sent_gb": sum(one.sent_bytes for one in step.network) / 1e9,
                "mfu": step.flops / step.seconds / gpu_named(GPU).half_flops,
            }
        )
    return rows


def strong(plan: Planned) -> list[dict[str, Any]]:
    """A row for each global batch and number of GPUs that has at least one micro-batch each."""
    rows = []
    for batch in GLOBAL_BATCHES:
        alone = None
        for gpus in GPUS:
            accumulation, rest = divmod(batch, gpus * plan.case.micro_batch)
            if rest or not accumulation:
                continue
            taken = plan.step(gpus, accumulation).seconds
            alone = alone or taken
            rows.append(
                {
                    "model": plan.case.name,
                    "zero_stage": plan.stage,
                    "batch": batch,
                    "gpus": gpus,
                    "accumulation": accumulation,
                    "step_s": taken,
                    "speedup": alone / taken,
                    "efficiency": alone / taken / gpus,
                }
            )
    return rows
