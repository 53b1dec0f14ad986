"""Step times from 1 to 4,096 GPUs: weak scaling (as many images a GPU) and strong scaling (as many images a step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.scaling_model.cases import CLASSES, GPU, GPUS, STAGES, Case, cluster
from maskmatch_scale.planning.build import build
from maskmatch_scale.planning.communication import step_traffic
from maskmatch_scale.planning.hardware import gpu_named
from maskmatch_scale.planning.step_time import StepTime, step_time
from maskmatch_scale.planning.subject import Subject

GLOBAL_BATCHES = (1024, 16384)
"""Labelled images of a step in strong scaling, and as many unlabelled ones."""
ONCE_A_STEP = ("optimizer", "optimizer, on the host", "teacher's average")


@dataclass(frozen=True)
class Planned:
    """A case at one ZeRO stage, whose micro-batch was traced once."""

    case: Case
    stage: int
    subject: Subject

    @property
    def parameters(self) -> int:
        """Of the student, context decoder included."""
        return sum(p.numel() for p in self.subject.student.parameters())

    def step(self, gpus: int) -> StepTime:
        """Of one micro-batch."""
        return step_time(self.subject, cluster(gpus))

    def seconds(self, gpus: int, accumulation: int) -> float:
        """Of a step of several micro-batches: the passes so often, the update once.

        What of the network is not hidden grows with the bytes that are sent.
        """
        step = self.step(gpus)
        passes = sum(part.seconds for part in step.parts if part.name not in ONCE_A_STEP)
        update = sum(part.seconds for part in step.parts if part.name in ONCE_A_STEP)
        engine = self.subject.recipe.engine.model_copy(update={"accumulation": accumulation})
        recipe = self.subject.recipe.model_copy(update={"engine": engine})
        sent = {one.what: one.sent(gpus) for one in step_traffic(replace(self.subject, recipe=recipe), gpus)}
        network = sum(one.exposed_s * sent[one.what] / one.sent_bytes for one in step.network if one.sent_bytes)
        return accumulation * passes + update + network


def planned(cases: Sequence[Case]) -> Iterator[Planned]:
    """Every case at every stage."""
    for case in cases:
        for stage in STAGES:
            yield Planned(case, stage, build(case.recipe(stage), gpu_named(GPU), CLASSES).subject)


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
                "zero_stage": plan.stage,
                "gpus": gpus,
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
            taken = plan.seconds(gpus, accumulation)
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
