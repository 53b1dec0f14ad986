"""Sections of a recipe about the run itself and its evaluations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from maskmatch_scale.recipe.section import Section
from maskmatch_scale.recipe.values import Positive, SidesPx, StepRange, StopSignal


class EvaluationRecipe(Section):
    """Evaluation at the label's own resolution, in training and by `maskmatch evaluate`."""

    # Decision: docs/decisions/0051-one-way-of-inference.md.
    mode: Literal["sliding", "whole"] = "sliding"
    """sliding: overlapping windows, whose probabilities are averaged. whole: each image in one forward pass, padded to
    whole patches; fewer products, and memory that grows with the image. With `engine.compile` every new size of image
    is compiled."""
    window_px: SidesPx | None = None
    """Height and width of a window in px (one number: a square), for `sliding`; null = `data.crop_px`."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Smallest share by which neighbouring windows overlap."""
    window_batch: Annotated[int, Field(ge=1)] = 8
    """Windows in one forward pass."""
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    """Factors by which each window, or whole image, is resized; the mean of the probabilities counts."""
    flip: bool = False
    """Whether mirror images (left to right) are predicted too, and averaged with the rest."""
    pictures: Annotated[int, Field(ge=0)] = 4
    """Held-out samples whose predictions are kept for the report, in place of those of an earlier evaluation of the
    split; 0 = none."""


class RunRecipe(Section):
    """The run itself."""

    dir: str
    """Run directory."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Number of optimizer steps; 0 = as many as `run.epochs` needs."""
    epochs: Positive | None = None
    """Length of the run instead of `run.steps`: how often all unlabelled samples are read (in a supervised run: all
    labelled samples). Several sources share these reads by their weights, not by their sizes."""
    last_batch: Literal["drop", "pad"] = "pad"
    """With `run.epochs`, when the samples do not fill the last step. drop: leave them out. pad: fill the step from the
    next epoch."""
    seed: int = 0
    """Seed of everything random except the draw of labelled samples (`data.split_seed`)."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between checkpoints; 0 = only at the end."""
    keep_last: Annotated[int, Field(ge=0)] = 2
    """How many of the last checkpoints are kept. By default two: if the newest is damaged, the one before is taken. The
    newest one is never deleted, whatever is set here."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints whose step is a multiple of this are kept too; 0 = none."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """How many of the best checkpoints are kept too, by the teacher's mIoU on `dev`. If an evaluation is among the best
    so far, a checkpoint is written after its step. 0 = none."""
    max_failed_saves: Annotated[int, Field(ge=1)] = 3
    """Number of checkpoints in a row that cannot be written, for example because the disk is full, before the run
    stops."""
    evaluate_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between evaluations on the split `dev`; 0 = only at the end."""
    # Decision: docs/decisions/0058-early-stopping.md.
    patience: Annotated[int, Field(ge=1)] | None = None
    """Number of evaluations in a row on `dev` without a better mIoU of the teacher after which the run ends early, as
    after its last step: with a checkpoint, the last evaluations and exit code 0. The learning rate still falls as for
    `run.steps`. Needs `run.keep_best`. null = the run takes all its steps (docs/fine_tuning.md)."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between lines of progress; metrics stay on the device until then."""
    max_hours: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    """Hours after which the run stops with a checkpoint and exit code 75, counted from the start of the process, anew
    at every start; the checkpoint is complete by then. 0 = no limit (docs/stopping.md)."""
    stop_signals: tuple[StopSignal, ...] = ("SIGTERM", "SIGUSR1", "SIGINT")
    """Signals after which the run stops with a checkpoint and exit code 75, when any rank gets one: of SIGTERM, SIGINT,
    SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU. [] = none (docs/stopping.md)."""
    profile: StepRange | None = None
    """[first, last]: steps, counted from 1, of which every rank writes a trace of torch's profiler to
    RUN/profile/rank-N.json.gz (docs/watching.md). null = none."""
    max_nonfinite_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps with non-finite gradients that are left out before the run stops. Above 0 it costs one device
    synchronisation per step at ZeRO-0 and under accelerate; DeepSpeed's other stages always wait."""
