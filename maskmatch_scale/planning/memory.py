"""Memory of a rank: model states by ZeRO's formulas, and the largest pass of a traced step.

States in bytes a parameter, with N ranks (docs/zero.md, benchmarks/README.md): weights, gradients, masters and moments
of the student, and the teacher's fp32 average; a frozen teacher is whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from maskmatch_scale.planning.setting import Cluster
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.planning.trace import passes_of, trace


@dataclass(frozen=True)
class MemoryPlan:
    """Of one rank, bytes."""

    states_bytes: float
    activations_bytes: float
    """Of the largest pass, beside the states, with what earlier passes have left."""
    available_bytes: float

    @property
    def peak_bytes(self) -> float:
        """The most at once."""
        return self.states_bytes + self.activations_bytes

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.peak_bytes <= self.available_bytes


def plan_memory(subject: Subject, cluster: Cluster) -> MemoryPlan:
    """Memory of a rank in a step after the burn-in."""
    states = states_bytes(subject, cluster.ranks)
    return MemoryPlan(states, _activations(subject), cluster.gpu.memory_bytes)


def states_bytes(subject: Subject, ranks: int) -> float:
    """On the device: of a rank, between backward pass and optimizer step."""
    engine = subject.recipe.engine
    every = sum(p.numel() for p in subject.student.parameters())
    trained = sum(p.numel() for p in subject.student.parameters() if p.requires_grad)
    stage, half = engine.zero_stage, engine.precision in ("bf16", "fp16") and engine.library == "deepspeed"
    weights = (2 if half else 4) * every / (ranks if stage == 3 else 1)
    gradients = (2 if engine.precision == "fp16" else 4) * trained / (ranks if stage >= 2 else 1)
    optimizer = (8 + (4 if stage else 0)) * trained / (ranks if stage else 1)
    teacher = 4.0 * every / (ranks if stage == 3 else 1)
    if engine.offload_optimizer:
        optimizer = 0.0
    if engine.offload_parameters:
        weights = teacher = 0.0
    frozen = sum(p.numel() for p in subject.frozen_teacher.parameters()) if subject.frozen_teacher is not None else 0
    return weights + gradients + optimizer + teacher + 4.0 * frozen


@lru_cache(maxsize=64)
def _activations(subject: Subject) -> float:
    left = largest = 0.0
    for name in passes_of(subject):
        images = subject.labelled_images if name == "loss_x" else subject.unlabelled_images or subject.labelled_images
        found = trace(subject, name, images)
        largest = max(largest, left + found.peak_bytes)
        left += found.left_bytes
    return largest
