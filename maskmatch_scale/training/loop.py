"""The way of a run, from recipe to report: check, build, loop, close."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NoReturn

from maskmatch_scale.checkpoints.layout import folder_name
from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.engine import setup
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.watch import Watch, watch_ranks
from maskmatch_scale.errors import RESUMABLE, TrainingStopped
from maskmatch_scale.files import disk_fault
from maskmatch_scale.hosts.meeting import telling_others
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.runs.folder import open_folder, rank_log
from maskmatch_scale.training import preflight
from maskmatch_scale.training.callbacks import CALLBACKS, Callback
from maskmatch_scale.training.host_checks import check_hosts, measure_links
from maskmatch_scale.training.preflight import Checked
from maskmatch_scale.training.run import Run, build_run
from maskmatch_scale.training.signals import Signals, listening
from maskmatch_scale.training.step import take_step

_log = logging.getLogger("maskmatch_scale")


def train(recipe: Recipe, resume: str | None = None, *, callbacks: Sequence[Callable[[Run], Callback]] = ()) -> Path:
    """Train a recipe in this process: one rank of a launcher's job, or the only one.

    Args:
        recipe: from :func:`maskmatch_scale.recipe.load_recipe`.
        resume: `auto` (the run directory's newest checkpoint that is whole, or a new run if it has none), a path to a
            run or a checkpoint, or None for a new run.
        callbacks: your own callbacks, called after the usual ones: subclasses of `Callback`, or functions that take a
            `Run` and return a callback.

    Returns:
        The run directory.

    Raises:
        UserError: a mistake that the user can correct. It is found before anything is written, except for a bad sample,
            which may be read later.
        TrainingStopped: the run stopped before its last step: a loss is not finite, too many samples are bad, a signal
            came (`run.stop_signals`), the time is up (`run.max_hours`), or a callback asked for it.
    """
    with listening(recipe.run.stop_signals) as signals:
        return _train(recipe, resume, callbacks, signals)


def _train(
    recipe: Recipe, resume: str | None, callbacks: Sequence[Callable[[Run], Callback]], signals: Signals | None
) -> Path:
    place = Place.from_environment()
    with telling_others(place):
        checked = preflight.check(recipe, resume)
    with setup.environment_kept(place):
        notes = check_hosts(checked.recipe, place)
        return _run(checked, notes, callbacks, signals)


def _run(
    checked: Checked,
    notes: tuple[str, ...],
    callbacks: Sequence[Callable[[Run], Callback]],
    signals: Signals | None,
) -> Path:
    recipe, folder = checked.recipe, checked.folder
    if checked.place.world_size > 1:  # where NCCL's watchdog writes its record; it appends the rank
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder.collectives(0)).removesuffix("0"))
    runtime = setup.start(checked.place, recipe.engine)
    with watch_ranks(runtime, recipe.engine.collective_timeout_s) as watch:
        deferred = checked.student.deferred is not None
        preflight.check_agreement(
            runtime, recipe, checked.batches, checked.checkpoint, deferred=deferred, frozen=checked.frozen_facts
        )
        checked = preflight.verify_checkpoint(runtime, checked)
        notes += measure_links(runtime)
        preflight.count_class_pixels(runtime, recipe, checked.batches)
        log, collectives = folder.log(runtime.rank), folder.collectives(runtime.rank)
        with (
            open_folder(folder, recipe, checked.data, runtime, continued=checked.continues_in_place),
            rank_log(log),
            watch.logging_to(log, collectives),
        ):
            run = build_run(checked, runtime, notes)
            makers: list[Callable[[Run], Callback]] = [*CALLBACKS, *callbacks]
            run.callbacks = [make(run) for make in makers]
            if signals is not None:
                signals.keep(lambda name: run.ask_to_stop(f"got {name}", RESUMABLE))
            _take_steps(run, watch)
    return folder.path


@contextmanager
def _stopped_by_disks(run: Run, where: str) -> Generator[None, None, None]:
    """Let what a disk refuses to write end the run with one line, from the rank whose disk it is.

    Before the first step, where this is not used, such an error is one that the user can correct, and keeps its class.
    """
    try:
        yield
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        kept = run.last_checkpoint or "none"
        raise TrainingStopped(
            f"{where}: {fault}; then continue with --resume auto (last checkpoint: {kept})", on_all_ranks=False
        ) from error


def _take_steps(run: Run, watch: Watch) -> None:
    """Take the steps of a run; `callbacks/base.py` explains when each method of a callback is called."""
    steps, accumulation = run.recipe.run.steps, run.recipe.engine.accumulation
    on_gpu = run.runtime.device.type == "cuda"
    loader = load_batches(run.batches, run.start * accumulation, steps * accumulation, pin_memory=on_gpu)
    with ExitStack() as ending:
        ending.enter_context(closing(loader))  # ends the loader processes, whose CPU time counts only then
        for callback in reversed(run.callbacks):
            ending.callback(callback.ended)  # all of them in their order, even if one raises
        for callback in run.callbacks:
            callback.started()
        if run.stopping:  # in an evaluation that the last start left out
            raise TrainingStopped(f"{run.stopping.reason}; stopped before the first step", run.stopping.exit_code)
        for step in range(run.start, steps):
            if step >= run.end:  # which an evaluation may have brought nearer
                break
            watch.step = step + 1
            with _stopped_by_disks(run, f"step {step + 1}"):
                _take_one(run, step, loader)
    watch.step = None
    with _stopped_by_disks(run, "after the last step"):
        for callback in run.callbacks:
            callback.finished()


def _take_one(run: Run, step: int, loader: Iterator[Batch]) -> None:
    """Take step ``step`` (from 0), and what comes after it."""
    done = step + 1
    is_last = done == run.recipe.run.steps
    for callback in run.callbacks:
        callback.before_step(step)
    figures = take_step(run, step, loader)
    for callback in run.callbacks:
        callback.after_step(done, figures)
    if any(callback.wants_records(done) for callback in run.callbacks):
        records = run.metrics.flush()
        for callback in run.callbacks:
            callback.records_read(records)
    if is_last:
        run.agreement.settle()  # there is no later step to read it
    else:
        run.agreement.exchange()
    for callback in run.callbacks:
        callback.between_steps(done)
    if done == run.end:
        run.agreement.settle()  # what these have asked for, which else the next step would read
    if run.stopping:
        _stop(run, done)


def _stop(run: Run, done: int) -> NoReturn:
    """Write a checkpoint and raise what ends the run; all ranks call it together.

    Raises:
        TrainingStopped: with the reason, and where the checkpoint is.
    """
    stop = run.stopping
    assert stop is not None
    if run.agreement.wanted is not None:
        _log.info("this rank wants to stop: %s", run.agreement.wanted.reason)
    records = run.metrics.flush()  # a figure that is not finite must end the run before a checkpoint is written
    if records:
        for callback in run.callbacks:
            callback.records_read(records)
    for callback in run.callbacks:
        callback.stopping(done)
    if stop.exit_code != RESUMABLE:
        raise TrainingStopped(stop.reason, stop.exit_code)
    checkpoint = run.last_checkpoint
    if checkpoint is None or checkpoint.name != folder_name(done):
        raise TrainingStopped(f"{stop.reason}; stopped after step {done}, of which no checkpoint could be written")
    raise TrainingStopped(f"{stop.reason}; stopped after step {done}, checkpoint {checkpoint}", RESUMABLE)
