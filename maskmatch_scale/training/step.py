"""One optimizer step: batches → views → losses → engine → teacher.

Decision: docs/decisions/0007-no-files-of-random-state.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.data.faults import REASONS
from maskmatch_scale.data.order.source import Skip
from maskmatch_scale.data.remote.shard_cache import NOTHING, Fetched
from maskmatch_scale.engine.protocol import leaves_out
from maskmatch_scale.method.ema import ema_decay
from maskmatch_scale.method.maskmatch import PARTS, Step
from maskmatch_scale.models.batchnorm import restore_statistics, running_statistics
from maskmatch_scale.seeds import derive_seed
from maskmatch_scale.training.run import Run


@dataclass
class StepFigures:
    """Figures of a step that was launched. Reading `on_device` or `later` waits for the device."""

    known: dict[str, float | bool | None] = field(default_factory=dict)
    """Figures that are known already."""
    on_device: dict[str, Tensor] = field(default_factory=dict)
    """Figures that are scalars on the device."""
    later: dict[str, Callable[[], float]] = field(default_factory=dict)
    """Times in seconds. Call these functions only when the device has done the step."""
    images: int = 0
    """Distinct images over all ranks."""
    skipped: tuple[Skip, ...] = ()
    """Bad samples that this rank skipped."""
    fetched: Fetched = NOTHING
    """What this rank's loader processes have fetched from other machines meanwhile."""
    left_out: bool = False
    """Whether the step was not taken, because its gradients were not finite (`run.max_nonfinite_steps`)."""


def take_step(run: Run, step: int, batches: Iterator[Batch]) -> StepFigures:
    """Take one optimizer step; all ranks call it together.

    Losses are means over the global batch. The average is updated last, whichever teacher labels.

    Args:
        run: on this rank.
        step: number of the step, from 0.
        batches: `engine.accumulation` micro-batches are taken from it.
    """
    recipe, engine, maskmatch, runtime = run.recipe, run.engine, run.maskmatch, run.runtime
    stop_step = runtime.stopwatch()
    figures = StepFigures()
    maskmatch.train()
    prepared = []
    waited = 0.0
    for _ in range(recipe.engine.accumulation):
        asked = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - asked
        figures.skipped += batch.skipped
        figures.fetched += batch.fetched
        prepared.append(maskmatch.prepare(batch.to(runtime.device)))

    local = torch.stack([maskmatch.denominators(micro) for micro in prepared]).sum(0)
    pixels = runtime.sum_over_ranks(local)
    # The engine averages gradients over ranks; the losses are means over the pixels of all of them.
    scale = runtime.world_size / _divisors(pixels)
    sums = torch.zeros(5 + len(REASONS), dtype=torch.float64, device=runtime.device)
    if figures.skipped:  # rarely: the copy from the host waits
        sums[5:] = _count_reasons(figures.skipped).to(runtime.device)
    # A forward changes the running statistics of BatchNorm, also when the step is left out afterwards.
    statistics = running_statistics(run.student) if leaves_out(recipe) else []
    stop = runtime.stopwatch()
    if run.frozen_teacher is not None:
        frozen = run.frozen_teacher
        pseudo_labels = [maskmatch.pseudo_label(micro, frozen, frozen.normalise) for micro in prepared]
    else:
        with run.teacher.gathered():
            pseudo_labels = [maskmatch.pseudo_label(micro, run.teacher) for micro in prepared]
    teacher_s = stop()
    for number, (micro, pseudo) in enumerate(zip(prepared, pseudo_labels, strict=True)):
        parts = (micro.parts[-1:] + micro.parts[:-1]) if engine.every_gradient_first else micro.parts
        for part in parts:
            # Dropout and drop path draw from torch's global generator. A seed for each view makes a restart exact, and
            # the order of views of no matter.
            torch.manual_seed(derive_seed(recipe.run.seed, "step", step, runtime.rank, number, part))
            # One view at a time, so that only one view's activations are kept for a backward pass.
            last = micro is prepared[-1] and part == parts[-1]
            sums[PARTS.index(part)] += engine.accumulate(part, micro, pseudo, scale, last=last)
        if pseudo is not None and micro.unlabelled is not None:
            valid = micro.unlabelled.weak.valid
            sums[3:5] += torch.stack([(pseudo.confident & valid).sum(), valid.sum()])
    engine.step(step)
    figures.left_out = engine.skipped and recipe.engine.precision != "fp16"
    stop = runtime.stopwatch()
    if engine.skipped:
        restore_statistics(statistics)
    else:
        run.teacher.update(ema_decay(step + 1, recipe.method.ema_decay))
    figures.later = {"teacher_s": teacher_s, "ema_s": stop()}
    _fill(figures, run, step, prepared[0], runtime.sum_over_ranks(sums), pixels)
    step_s = stop_step()
    figures.known["data_wait_s"] = waited
    # Of the device: the host has long gone on to the next steps when a GPU has done this one.
    figures.later |= {"images_per_s": lambda: figures.images / step_s(), "step_s": step_s}
    return figures


def _divisors(pixels: Tensor) -> Tensor:
    """By what sums of losses are divided: 1 where nothing was counted. That of the labelled loss is a sum of weights of
    classes, and may be below 1.
    """
    return torch.where(pixels > 0, pixels, 1.0)


def _count_reasons(skipped: Sequence[Skip]) -> Tensor:
    """How many samples were skipped for each of `REASONS`: float64 (reasons,), on the CPU."""
    counts = torch.zeros(len(REASONS), dtype=torch.float64)
    for skip in skipped:
        counts[REASONS.index(skip.reason)] += 1
    return counts


def _fill(figures: StepFigures, run: Run, step: int, micro: Step, sums: Tensor, pixels: Tensor) -> None:
    """Fill in the figures of a step; nothing here waits for the device.

    Args:
        figures: filled in place.
        run: on this rank.
        step: number of the step, from 0.
        micro: one of its micro-batches; all of them have the same parts.
        sums: float64 (5 + reasons,), over all ranks: the sums of the three losses, the numbers of confident and of
            valid pixels, and the skipped samples by reason.
        pixels: float64 (3,), over all ranks: the divisors of the three losses.
    """
    recipe = run.recipe
    losses = sums[:3] / _divisors(pixels)
    unlabelled = micro.unlabelled is not None and run.batches.unlabelled is not None
    there = (run.batches.labelled is not None, bool(micro.views), micro.masked is not None)
    known, on_device = figures.known, figures.on_device
    known |= dict.fromkeys(("loss", *PARTS))
    on_device["loss"] = losses[0] + recipe.method.unlabelled_weight * losses[1] + recipe.method.mask.weight * losses[2]
    on_device |= {name: loss for name, loss, is_there in zip(PARTS, losses, there, strict=True) if is_there}
    known["lr"] = run.engine.lr(step)
    norm = None if figures.left_out else run.engine.grad_norm
    known["grad_norm"] = norm if isinstance(norm, float) else None
    if isinstance(norm, Tensor):
        on_device["grad_norm"] = norm.detach()
    known["coverage"] = None
    if unlabelled:
        on_device["coverage"] = sums[3] / sums[4].clamp(min=1)
    a_rank = recipe.engine.micro_batch * (there[0] + unlabelled * recipe.data.unlabelled_per_labelled)
    figures.images = a_rank * recipe.engine.accumulation * run.runtime.world_size
    if figures.left_out:
        known["left_out"] = True
    elif run.engine.skipped:
        known["overflow"] = True
    on_device |= {f"skipped/{reason}": count for reason, count in zip(REASONS, sums[5:], strict=True)}
