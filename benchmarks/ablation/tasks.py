"""The tasks: which data, model and training an arm changes something of; and the recipe of one cell."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.ablation.arms import Arm
from benchmarks.ablation.start import run_of
from benchmarks.harness import ROOT
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import Recipe, load_recipe, parse_recipe

Content = dict[str, Any]
"""Sections of a recipe."""

FIXED = {"data.root", "data.split_seed", "run.dir", "run.steps", "run.epochs", "run.seed", "run.checkpoint_every"}
FIXED |= {"run.evaluate_every", "run.patience", "model.pretrained"}
"""Keys that options of the command or the cell itself decide."""


@dataclass(frozen=True)
class Task:
    """Data, model and training that all arms share."""

    title: str
    content: Callable[[int], Content]
    """Sections of the recipe without data and weights, given the steps of the shortest run."""
    labelled: int
    """Labelled images of a draw, unless `--labelled` says otherwise."""
    splits: tuple[str, ...]
    """Streams on which arms are compared; nothing is chosen on them. The curve is on `dev`."""
    needs_weights: bool
    unlabelled_stream: str | None = None
    """Stream that is read as unlabelled images; None: `unlabelled`."""


def _camvid(steps: int) -> Content:
    """As in `benchmarks/windows.py`; decay of the teacher and burn-in as in its issue."""
    return {
        "data": {"crop_px": 168},
        "model": {"backbone": "timm/vit_small_patch14_dinov2", "head": "linear"},
        "method": {"threshold": 0.9, "ema_decay": 0.99, "burn_in": 0.25, "mask": {"keep": 0.3, "view": "weak"}},
        "optim": {"lr": 2e-5, "head_lr_multiplier": 20.0, "warmup_steps": steps // 20},
        "engine": {"micro_batch": 4},
        "evaluation": {"window_batch": 12},
    }


def _quickstart(config: str) -> Callable[[int], Content]:
    def content(steps: int) -> Content:
        # Its backbone may be a folder of this repository, from where cells are run.
        recipe = load_recipe(ROOT / "configs" / config).model_dump(mode="json", exclude_unset=True)
        return {name: section for name, section in recipe.items() if name != "run"}

    return content


TASKS = {
    "camvid": Task("CamVid, ViT-S/14", _camvid, 8, ("val", "val_seen"), True, "labelled"),
    "scores_segformer": Task(
        "scores, SegFormer", _quickstart("quickstart-segformer.yaml"), 2, ("val", "val_font"), False
    ),
    "scores_vit": Task("scores, ViT", _quickstart("quickstart-vit.yaml"), 2, ("val", "val_font"), False),
    "colours": Task("colours, SegFormer", _quickstart("quickstart-segformer.yaml"), 2, ("val",), False),
}
"""All tasks by name. `colours` is the null case: its colours say its classes (`colours.py`)."""


@dataclass(frozen=True)
class Setting:
    """A task with what the command line says of it."""

    task: str
    data: Path
    weights: Path | None
    labelled: int
    steps: int
    """S: of the shortest run."""
    device: str
    """cpu or cuda."""
    settings: tuple[str, ...] = ()
    """`section.key=value` for every arm; an arm's own keys go before them."""
    start: Path | None = None
    """Folder of trained runs, one a draw, that the draws start from in place of `weights` (`start.py`); then there is
    no burn-in."""

    def recipe(self, arm: Arm, draw: int, steps: int, folder: Path, *, checkpoint_every: int = 0) -> Recipe:
        """The recipe of one cell.

        The learning rate does not fall, so that every point of a run's curve is a run of that length; for the same
        reason the burn-in is a share of S steps, also of a longer run.

        Args:
            arm: whose keys are set.
            draw: of the labels, and seed of the run; so the arms of a draw are paired.
            steps: of this run, at least S.
            folder: run directory.
            checkpoint_every: steps between checkpoints.

        Raises:
            UserError: a key or value is wrong.
        """
        for setting in self.settings:
            if setting.partition("=")[0] in FIXED:
                raise UserError(f"--set {setting}: this key is not for --set; an option or the cell decides it")
        content = TASKS[self.task].content(self.steps)
        data = {"root": str(self.data), "labelled_count": self.labelled, "split_seed": draw}
        stream = TASKS[self.task].unlabelled_stream
        if stream is not None:
            data["unlabelled"] = [{"root": str(self.data), "stream": stream, "name": "unlabelled"}]
        on_gpu = self.device == "cuda"
        pretrained = run_of(self.start, draw) if self.start else self.weights
        common: Content = {
            "data": {"workers": 1 if on_gpu else 0, **data},
            "model": {"pretrained": str(pretrained)} if pretrained else {},
            "method": {"burn_in": 0.0} if self.start else {},
            "optim": {"schedule": "constant"},
            "engine": {
                "library": "accelerate",
                "zero_stage": 0,
                "threads": 1,
                "precision": "autocast-bf16" if on_gpu else "fp32",
            },
            "evaluation": {"pictures": 0},
            "record": {"report_every_s": 0},
            "run": {
                "dir": str(folder),
                "steps": steps,
                "seed": draw,
                "log_every": 25,
                "evaluate_every": 0,
                "checkpoint_every": checkpoint_every,
                "keep_last": 1,
                "keep_best": 0,
            },
        }
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(content), OmegaConf.create(common)))
        source = f"task {self.task}, arm {arm.title}"
        recipe = parse_recipe(merged, source, [*self.settings, *arm.settings])
        burn_in = recipe.method.burn_in * self.steps / steps
        return recipe.model_copy(update={"method": recipe.method.model_copy(update={"burn_in": burn_in})})


def check_streams(task: str, data: Path, splits: Sequence[str]) -> None:
    """Refuse a data folder that lacks a stream which the task needs, or one of the splits.

    Raises:
        UserError: names the folder and the streams.
    """
    streams = load_index(str(data)).streams
    wanted: Sequence[str] = ("labelled", TASKS[task].unlabelled_stream or "unlabelled", "dev", *splits)
    missing = [name for name in dict.fromkeys(wanted) if name not in streams]
    if missing:
        raise UserError(
            f"--data {data}: task {task} needs the streams {', '.join(dict.fromkeys(wanted))}, and there is no "
            f"{' or '.join(missing)} (there are: {', '.join(streams)})"
        )


def setting_of(
    options: argparse.Namespace, steps: int, device: str, splits: Sequence[str] = (), start: Path | None = None
) -> Setting:
    """A task with the options `data`, `weights`, `labelled` and `settings`, checked; and that there are these splits.

    Raises:
        UserError: an option is wrong.
    """
    task = TASKS[options.task]
    if options.labelled is not None and not options.labelled > 0:
        raise UserError(f"--labelled: {options.labelled}; it must be above 0")
    if start is not None and options.weights is not None:
        raise UserError("--weights: with --start the draws start from trained runs; leave it out")
    if task.needs_weights and options.weights is None and start is None:
        raise UserError(f"--weights: task {options.task} starts from pretrained weights; name their file")
    if not task.needs_weights and options.weights is not None:
        raise UserError(f"--weights: task {options.task} starts from scratch; leave it out")
    check_streams(options.task, options.data, splits)
    weights = options.weights.resolve() if options.weights else None
    labelled = options.labelled or task.labelled
    data, settings = options.data.resolve(), tuple(options.settings)
    return Setting(options.task, data, weights, labelled, steps, device, settings, start.resolve() if start else None)
