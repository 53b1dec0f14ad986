"""The memory of a rank: what is there from step to step, what a step adds, and the largest micro-batch that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from maskmatch_scale.engine.precision import weights_dtype
from maskmatch_scale.planning.setting import Cluster
from maskmatch_scale.planning.states import (
    REDUCED_AT_ONCE,
    HostStates,
    States,
    keeps_flat_gradients,
    numel,
    states,
)
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.planning.trace import Pass, Trace, images_of, passes_of, trace

CONTEXT_BYTES = 1_500_000_000
"""Taken of a GPU beside tensors: CUDA's context and kernels, cuBLAS' and cuDNN's work spaces, NCCL's buffers. An
assumption: it was not measured."""
FRAGMENTATION = 0.08
"""Share of the rest that torch's allocator may reserve without being able to use it."""
SEARCHED_IMAGES = 4096
"""The largest micro-batch that is said to fit."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank."""

    states: States
    host: HostStates
    traces: Mapping[Pass, Trace]
    """Of the passes of one micro-batch, each by itself: memory beside the states."""
    peaks: Mapping[str, int]
    """The most at each moment of a step: its passes by name, and "step", the optimizer's."""
    peak: int
    """The most of a step, one backward pass a view, which is what the engine does."""
    together: int
    """The most if all views were one backward pass: what one view at a time saves."""
    usable: int
    """Of the GPU's memory, what tensors can take: the rest is left for `CONTEXT_BYTES` and `FRAGMENTATION`."""
    largest_micro_batch: int
    """`engine.micro_batch` that fits, with as many unlabelled images for each labelled one; 0: not even one."""

    @property
    def fits(self) -> bool:
        """Whether the recipe's own micro-batch does."""
        return self.peak <= self.usable


def plan_memory(subject: Subject, cluster: Cluster) -> MemoryPlan:
    """The memory of each rank of a cluster that trains the subject.

    Args:
        subject: recipe and models.
        cluster: number of ranks and memory of a device.
    """
    on_device, host = states(subject, cluster.ranks)
    usable = usable_bytes(cluster.gpu.memory_bytes)
    traces = {part: trace(subject, part, images_of(subject, part)) for part in passes_of(subject)}
    peaks = _peaks(subject, on_device, traces, cluster.ranks)
    return MemoryPlan(
        states=on_device,
        host=host,
        traces=traces,
        peaks=peaks,
        peak=max(peaks.values()),
        together=_together(on_device, traces, subject.recipe.engine.accumulation),
        usable=usable,
        largest_micro_batch=_largest_micro_batch(subject, cluster.ranks, usable, peaks),
    )


def usable_bytes(memory_bytes: int) -> int:
    """What tensors can take of a device's memory."""
    return int(max(0, memory_bytes - CONTEXT_BYTES) * (1 - FRAGMENTATION))


def device_memory(subject: Subject, ranks: int) -> tuple[int, dict[str, int]]:
    """Bytes on a device between steps, and `MemoryPlan.peaks`, without the rest of the plan."""
    on_device, _ = states(subject, ranks)
    traces = {part: trace(subject, part, images_of(subject, part)) for part in passes_of(subject)}
    return _always(subject, on_device), _peaks(subject, on_device, traces, ranks)


def step_peak(subject: Subject, ranks: int) -> int:
    """The most bytes on a device in a step: `MemoryPlan.peak` without the rest of the plan."""
    return max(device_memory(subject, ranks)[1].values())


def _always(subject: Subject, own: States) -> int:
    """What is there between steps, with the gradients and buckets whose memory an engine keeps."""
    return own.kept + _kept_gradients(subject, own) + (own.buckets if subject.recipe.engine.zero_stage == 3 else 0)


def _kept_gradients(subject: Subject, own: States) -> int:
    engine = subject.recipe.engine
    return own.gradients if engine.zero_stage == 3 or keeps_flat_gradients(engine) or engine.cuda_graphs else 0


def _peaks(subject: Subject, own: States, traces: Mapping[Pass, Trace], ranks: int) -> dict[str, int]:
    engine = subject.recipe.engine
    stage, micro_batches = engine.zero_stage, engine.accumulation
    always = _always(subject, own)
    views = traces["views"]
    peaks: dict[str, int] = {"views": always + (micro_batches - 1) * views.left_bytes + views.peak_bytes}
    left = micro_batches * views.left_bytes
    if "teacher" in traces:
        teacher = traces["teacher"]
        peaks["teacher"] = always + own.gathered + left + teacher.peak_bytes
        left += micro_batches * teacher.left_bytes
    gradients = own.gradients - _kept_gradients(subject, own)
    students: list[Pass] = [part for part in traces if part.startswith("loss_")]
    is_first = micro_batches == 1
    for part in students:
        found = traces[part]
        base = always + left + own.gathered + (0 if is_first else gradients)
        buckets = own.buckets if stage in (1, 2) else 0
        # At stage 1 the bucket stays until the step; at stage 2 each backward pass makes its own.
        early = found.peak_bytes + (buckets if stage == 1 and not is_first else 0)
        late = found.late_peak_bytes + buckets
        if stage == 2:
            late += gradients  # those of this pass, before they are added to those of the passes before
        peaks[part] = base + max(early, late)
        is_first = False
    peaks["step"] = always + left + gradients + _of_step(subject, own, ranks)
    return peaks


def _of_step(subject: Subject, own: States, ranks: int) -> int:
    """What averaging gradients and the optimizer's step add to the gradients, when activations are gone."""
    engine = subject.recipe.engine
    trained = numel(p for p in subject.student.parameters() if p.requires_grad)
    stage = engine.zero_stage
    if engine.library != "deepspeed":
        return 0
    if stage == 0 or keeps_flat_gradients(engine):
        return 4 * min(trained, REDUCED_AT_ONCE)
    part = -(-trained // ranks)
    if stage == 1:
        return own.buckets + weights_dtype(subject.recipe).itemsize * part
    if stage == 2:
        return own.buckets + 4 * part
    # The gradients of a bucket, laid out anew for each rank, and what they are received into.
    return own.gathered + own.buckets * min(trained, _elements(own)) // max(1, _elements(own))


def _elements(own: States) -> int:
    return own.buckets // 4


def _together(own: States, traces: Mapping[Pass, Trace], micro_batches: int) -> int:
    """All views in one backward pass: all activations at once, and what the largest pass needs beside its own."""
    students = [found for part, found in traces.items() if part.startswith("loss_")]
    left = micro_batches * sum(found.left_bytes for part, found in traces.items() if not part.startswith("loss_"))
    saved = sum(found.saved_bytes for found in students)
    beside = max((found.peak_bytes - found.saved_bytes for found in students), default=0)
    return own.kept + own.gradients + own.buckets + own.gathered + left + saved + beside


def with_micro_batch(subject: Subject, images: int) -> Subject:
    """The subject with another `engine.micro_batch`, and unlabelled images in proportion."""
    engine = subject.recipe.engine.model_copy(update={"micro_batch": images})
    ratio = subject.recipe.data.unlabelled_per_labelled
    return replace(
        subject,
        recipe=subject.recipe.model_copy(update={"engine": engine}),
        labelled_images=images if subject.labelled_images else 0,
        unlabelled_images=images * ratio if subject.unlabelled_images else 0,
    )


def _largest_micro_batch(subject: Subject, ranks: int, usable: int, peaks: Mapping[str, int]) -> int:
    """By the lines through the peaks of the recipe's own micro-batch and of one twice as large.

    Beyond chunks of a fixed size memory grows by the same for each image, and before that by more. So what a line says
    of other micro-batches is what they need, or more.
    """
    own = subject.recipe.engine.micro_batch
    _, twice = device_memory(with_micro_batch(subject, 2 * own), ranks)
    most = SEARCHED_IMAGES
    for moment, peak in peaks.items():
        an_image = (twice[moment] - peak) / own
        if an_image > 0:
            most = min(most, math.floor(own + (usable - peak) / an_image))
        elif peak > usable:
            most = 0
    return max(0, most)
