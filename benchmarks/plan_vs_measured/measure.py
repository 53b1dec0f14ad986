"""Memory and time of real steps of one rank: `training.step.take_step` with its engine and its teacher."""

from __future__ import annotations

import copy
import gc
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.plan_vs_measured.cases import CLASSES, IMAGES, Case
from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.engine.build import build_engine
from maskmatch_scale.engine.ema import build_teacher
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.method.maskmatch import MaskMatch, view_draws
from maskmatch_scale.method.views import Neighbour
from maskmatch_scale.models.batchnorm import synchronise_batchnorm
from maskmatch_scale.models.deferred import build_deferred
from maskmatch_scale.models.resample import upsampling_bands
from maskmatch_scale.planning.recorder import Recorder
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.training.step import take_step

TIMED_STEPS = 2
_FIRST, _SECOND = "the first step", "the step whose memory counts"


def measure(case: Case, runtime: Runtime) -> dict[str, Any]:
    """Build a run, take steps, and destroy it; all ranks call it together.

    Returns:
        In bytes, of tensors: `held_bytes` before a step (the second one), `peak_bytes`, the most in it, and
        `building_bytes`, the most before the first one. Up to stage 2 by torch's own allocations and frees. At stage 3
        a thread of gloo frees memory, which torch's profiler does not see: so there they are the sizes of all
        storages, noted when torch dispatches the operations that make them. `rss_bytes`: how much the resident memory
        of the process grew at most. `cpu_s` and `wall_s`: of the fastest of the timed steps on this rank.
    """
    upsampling_bands.cache_clear()
    gc.collect()
    resident = _reset_peak_resident()
    batch = _batch(case, runtime.rank)
    if case.stage < 3:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run = _build(case, runtime)
            with record_function(_FIRST):
                take_step(run, 0, iter([batch]))
            gc.collect()
            with record_function(_SECOND):
                take_step(run, 1, iter([batch]))
        found = _memory(profiler)
    else:
        with Recorder() as recorder:
            run = _build(case, runtime)
            building = recorder.peak_bytes
            take_step(run, 0, iter([batch]))
            gc.collect()
            recorder.begin_peak()
            held = recorder.live_bytes
            take_step(run, 1, iter([batch]))
        found = {"building_bytes": building, "held_bytes": held, "peak_bytes": recorder.peak_bytes}
    found["rss_bytes"] = _peak_resident() - resident
    times = []
    for number in range(2, 2 + TIMED_STEPS):
        runtime.sum_over_ranks(torch.zeros(1, dtype=torch.float64, device=runtime.device))  # begin together
        cpu, wall = time.process_time(), time.perf_counter()
        take_step(run, number, iter([batch]))
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    found["cpu_s"], found["wall_s"] = (min(column) for column in zip(*times))
    run.engine._engine.destroy()
    return found


def _build(case: Case, runtime: Runtime) -> Any:
    """As `training.run.build_run` does it, without data and checkpoints."""
    recipe: Recipe = case.recipe
    torch.manual_seed(0)
    if case.stage == 3:
        student, weights = build_deferred(case.student)
        student.deferred = weights
    else:
        student = case.student()
    average = copy.deepcopy(student)
    synchronise_batchnorm(student, runtime.sum_over_ranks)
    neighbour = Neighbour(runtime.rank % 2 == 0, runtime.of_neighbour)
    maskmatch = MaskMatch(student, recipe.method, 0, 255, neighbour=neighbour)
    engine = build_engine(maskmatch, student, recipe, runtime)
    return SimpleNamespace(
        recipe=recipe,
        engine=engine,
        maskmatch=maskmatch,
        runtime=runtime,
        student=student,
        frozen_teacher=None,
        teacher=build_teacher(average, engine),
        batches=SimpleNamespace(labelled=True, unlabelled=True),
    )


def _batch(case: Case, rank: int) -> Batch:
    recipe = case.recipe
    with torch.device("meta"):
        draws = view_draws(case.student(), recipe.method, 0, recipe.data.crop_px)
    positions = tuple(range(rank * IMAGES, (rank + 1) * IMAGES))
    batch = Batch.empty(IMAGES, IMAGES, recipe.data.crop_px, draws.width)
    for tensor, values in ((batch.labelled_images, 256), (batch.labels, CLASSES), (batch.unlabelled_images, 256)):
        tensor.random_(values)
    batch.unlabelled_valid.fill_(True)
    batch.draws.copy_(draws(positions))
    return Batch(*batch.tensors, positions)


def _memory(profiler: Any) -> dict[str, int]:
    """From the events of the profile, in the order of time."""
    events = profiler.profiler.kineto_results.events()  # the public view merges memory events into operators
    marks = {event.name(): event.start_ns() for event in events if event.name() in (_FIRST, _SECOND)}
    ends = {event.name(): event.end_ns() for event in events if event.name() in (_FIRST, _SECOND)}
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now, built, held, peak = 0, 0, 0, 0
    for moment, change in changes:
        now += change
        if moment < marks[_FIRST]:
            built = max(built, now)
        if moment < marks[_SECOND]:
            held = now
        elif moment <= ends[_SECOND]:
            peak = max(peak, now)
    return {"building_bytes": built, "held_bytes": held, "peak_bytes": max(peak, held)}


_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _reset_peak_resident() -> int:
    """Let the kernel forget the largest resident memory of this process; gives that of now, bytes."""
    _REFERENCES.write_text("5")
    return _peak_resident()


def _peak_resident() -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
