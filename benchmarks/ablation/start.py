"""Trained runs that the draws of a grid start from, instead of from first weights: `--start`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.ablation.sources import DIGITS
from maskmatch_scale.checkpoints.finding import find
from maskmatch_scale.checkpoints.layout import INDEX, CheckpointError
from maskmatch_scale.errors import UserError
from maskmatch_scale.files import sha256
from maskmatch_scale.recipe import load_recipe
from maskmatch_scale.recipe.bases import title_of


def run_of(start: Path, draw: int) -> Path:
    """The run directory that a draw starts from.

    Args:
        start: folder of one arm in the work folder of another grid.
        draw: number of the draw.
    """
    return start / f"draw-{draw}" / "run"


@dataclass(frozen=True)
class Start:
    """What a draw starts from: the teacher of the newest checkpoint of a run."""

    title: str
    """Method and steps."""
    digest: str
    """First digits of the sha256 of the checkpoint's index, which has the checksums of its parts."""


def start_of(start: Path, draw: int, labelled: int) -> Start:
    """Look at the run that a draw starts from.

    Args:
        start: as for :func:`run_of`.
        draw: number of the draw.
        labelled: labelled images of the draw.

    Raises:
        UserError: there is no checkpoint, or the run had other labels than this draw.
    """
    run = run_of(start, draw)
    try:
        found = find(run)
    except CheckpointError as error:
        raise UserError(f"--start: {error}; make it with the grid's --keep-checkpoints") from None
    recipe = load_recipe(run / "recipe.yaml")
    if (recipe.data.split_seed, recipe.data.labelled_count) != (draw, labelled):
        raise UserError(
            f"--start: {run} has {recipe.data.labelled_count} labelled images of draw {recipe.data.split_seed}, and "
            f"this grid {labelled} of draw {draw}: it would start from labels that it must not know"
        )
    title = title_of(recipe.method.base, masked=recipe.method.mask.keep is not None)
    return Start(f"{title}, {found.step} steps", sha256(found.folder / INDEX)[:DIGITS])
