"""Evaluating the newest checkpoint of a run on a held-out split. Figures and pictures are kept in the run directory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from maskmatch_scale.checkpoints.finding import find_checkpoint
from maskmatch_scale.data.shards.reading import load_index
from maskmatch_scale.engine.precision import autocast, autocast_dtype
from maskmatch_scale.evaluation.evaluate import Window, evaluate_split
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.evaluation.save_pictures import save_masked_pictures, save_pictures
from maskmatch_scale.files import write_whole
from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.data import recipe_of
from maskmatch_scale.runs.model import open_run


def window_of(recipe: Recipe, segmenter: Segmenter, device: torch.device) -> Window:
    """The windows into which held-out images of a run are cut."""
    dtype = next(segmenter.parameters()).dtype
    return Window(recipe.data.crop_px, recipe.evaluation, segmenter.mean, segmenter.std, device, dtype)


def held_out_images(run: Path, split: str) -> int:
    """Number of images in a split of a run's data.

    Raises:
        UserError: `run` is not a run directory, or its data have no such split.
    """
    data = recipe_of(run).data
    return load_index(data.root, data).stream(split).samples


def evaluate_run(
    run: Path, split: str, weights: tuple[str, ...], progress: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Evaluate a run's newest checkpoint, and keep figures in `RUN/evaluation` and pictures in `RUN/pictures`.

    The arithmetic is that of the run's own evaluations: fp32 weights, multiplied in the precision of its recipe.

    Args:
        run: run directory.
        split: stream name.
        weights: `ema`, `student` or both.
        progress: called after every image.

    Returns:
        One record for each kind of weights: `split`, `weights`, `step`, `miou`, `pixel_accuracy`, `iou` (by class; None
        for a class that does not occur), `images`, `seconds`.

    Raises:
        UserError: `run` has no checkpoint, or its data have no such split.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = RunFolder(run)
    records, models = [], {}
    recipe_of(run)  # a path that is no run is named as such
    checkpoint = find_checkpoint(run)
    for kind in weights:
        began = time.monotonic()
        recipe, segmenter, step = open_run(run, kind, checkpoint)
        index = load_index(recipe.data.root, recipe.data)
        models[kind] = segmenter.to(device)
        matrix = ConfusionMatrix(segmenter.num_classes, index.ignore_index)
        window = window_of(recipe, segmenter, device)
        with autocast(device, autocast_dtype(recipe)):
            images = evaluate_split(segmenter, recipe.data, split, window, matrix, progress=progress)
        record = {
            "split": split,
            "weights": kind,
            "step": step,
            "miou": matrix.miou(),
            "pixel_accuracy": matrix.pixel_accuracy(),
            "iou": {name: None if v != v else v for name, v in zip(index.classes, matrix.iou().tolist(), strict=False)},
            "images": images,
            "seconds": time.monotonic() - began,
        }
        folder.evaluations.mkdir(exist_ok=True)
        write_whole(folder.evaluation(split, kind), json.dumps(record, indent=1))
        records.append(record)
    with autocast(device, autocast_dtype(recipe)):
        samples = save_pictures(
            folder.pictures(split), recipe.data, split, recipe.evaluation.pictures, dict(models), window
        )
        if recipe.method.mask.keep is not None:
            # The student was trained on masked views, together with its context decoder.
            save_masked_pictures(samples, models.get("student", segmenter), recipe.method.mask, recipe.run.seed, window)
    return records
