"""Evaluating a checkpoint of a run on a held-out split. Figures and pictures are kept in the run directory."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from maskmatch_scale.checkpoints.finding import opened
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.engine.precision import autocast, autocast_dtype, uses_tf32
from maskmatch_scale.errors import UserError
from maskmatch_scale.evaluation.evaluate import evaluate_split
from maskmatch_scale.evaluation.inference import Inference, described, inference_with, window_of
from maskmatch_scale.evaluation.locality import measure_locality
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.evaluation.save_pictures import save_masked_pictures, save_pictures
from maskmatch_scale.evaluation.scored import scored_classes
from maskmatch_scale.files import folder_whole, write_whole
from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.by_class import thresholds_by_class
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.data import read_run_data, recipe_of, run_of
from maskmatch_scale.runs.model import load_model


def window_px(recipe: Recipe, segmenter: Segmenter) -> tuple[int, int]:
    """Height and width of the windows of a run.

    Raises:
        UserError: as :func:`~maskmatch_scale.evaluation.inference.window_of`.
    """
    return window_of(recipe.evaluation, recipe.data.crop_px, segmenter)


def inference_of(recipe: Recipe, segmenter: Segmenter, device: torch.device) -> Inference:
    """How the segmenter of a run is run on held-out images.

    Raises:
        UserError: as :func:`window_px`.
    """
    return inference_with(segmenter, recipe.evaluation, recipe.data.crop_px, device)


def held_out_images(where: Path, split: str) -> int:
    """Number of images in a split of a run's data.

    Raises:
        UserError: `where` is no run directory or checkpoint in one, or its data have no such split.
    """
    data = recipe_of(_run(where)).data
    return load_index(data.root, data).stream(split).samples


def _run(where: Path) -> Path:
    """The run directory that a path is or belongs to; the path itself if there is none, for a message that names it."""
    return run_of(where) or where


def evaluate_run(
    where: Path,
    split: str,
    weights: tuple[str, ...],
    progress: Callable[[], None] = lambda: None,
    overrides: Sequence[str] = (),
    *,
    locality: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a checkpoint of a run, and keep figures in `RUN/evaluation` and pictures in `RUN/pictures`.

    Those of the last call are kept, of whatever checkpoint; the figures say its step.

    The arithmetic is that of the run's own evaluations: fp32 weights, multiplied in the precision of its recipe, on a
    GPU in TF32 for `fp32`; this setting is of the whole process.

    Args:
        where: run directory, whose newest checkpoint is taken; or one of its checkpoints, such as
            `RUN/checkpoints/best`.
        split: stream name.
        weights: `ema`, `student` or both.
        progress: called after every image; with ``locality`` twice for each.
        overrides: ``evaluation.key=value``: keys that replace those of the run's recipe.
        locality: whether to measure what `evaluation/locality.py` measures, too; `locality` of the records then has it.

    Returns:
        One record for each kind of weights: `split`, `weights`, `step`, `inference` (mode, windows, scales, in words),
        `miou`, `pixel_accuracy`, `iou` (by class; None for a class that does not occur), `classes`, `classes_in_mean`,
        `classes_without_pixels` (:func:`~maskmatch_scale.evaluation.scored.scored_classes`), `images`, `seconds`.

    Raises:
        UserError: there is no such checkpoint, the data have no such split, or an override is wrong.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = _run(where)
    folder = RunFolder(run)
    records, models = [], {}
    for override in overrides:
        if not override.startswith("evaluation."):
            raise UserError(f"{override}: only keys of `evaluation` can be changed for an evaluation")
    recipe = recipe_of(run, overrides)  # a path that is no run is named as such
    thresholds = _thresholds(run, recipe) if locality else 0.0
    if uses_tf32(device, recipe.engine.precision):
        torch.set_float32_matmul_precision("high")
    with opened(where) as checkpoint:  # until both models are loaded: evaluating the first may take long
        index = load_index(recipe.data.root, recipe.data)
        for kind in weights:
            began = time.monotonic()
            segmenter = load_model(run, recipe, kind, checkpoint)
            models[kind] = segmenter.to(device)
            matrix = ConfusionMatrix(segmenter.num_classes, index.ignore_index)
            inference = inference_of(recipe, segmenter, device)
            with autocast(device, autocast_dtype(recipe)):
                images = evaluate_split(segmenter, recipe.data, split, inference, matrix, progress=progress)
                if locality:
                    found = measure_locality(segmenter, recipe, split, inference, thresholds, progress)
            iou = zip(index.classes, matrix.iou().tolist(), strict=False)
            record = {
                "split": split,
                "weights": kind,
                "step": checkpoint.step,
                "inference": described(recipe.evaluation, recipe.data.crop_px),
                "miou": matrix.miou(),
                "pixel_accuracy": matrix.pixel_accuracy(),
                "iou": {name: None if v != v else v for name, v in iou},
                **scored_classes(matrix, index.classes),
                "images": images,
                "seconds": time.monotonic() - began,
            }
            if locality:
                record["locality"] = found
            folder.evaluations.mkdir(exist_ok=True)
            write_whole(folder.evaluation(split, kind), json.dumps(record, indent=1))
            records.append(record)
    with autocast(device, autocast_dtype(recipe)):
        _keep_pictures(folder, split, recipe, models, inference)
    return records


def _thresholds(run: Path, recipe: Recipe) -> float | tuple[float, ...]:
    """τ for all classes, or one for each of those that the run was trained on: an index may name none.

    Raises:
        UserError: a class in `method.threshold` is unknown.
    """
    classes = read_run_data(run).classes
    try:
        return thresholds_by_class(recipe.method, classes, recipe.model.num_classes or len(classes))
    except ValueError as error:
        raise UserError(f"{RunFolder(run).recipe}: {error}") from None


def _keep_pictures(
    folder: RunFolder, split: str, recipe: Recipe, models: dict[str, Segmenter], inference: Inference
) -> None:
    """Write the pictures of a split in place of those of earlier evaluations: samples, weights or modes were others."""
    kept = folder.pictures(split)
    if not recipe.evaluation.pictures:
        shutil.rmtree(kept, ignore_errors=True)
        return
    with folder_whole(kept) as written:
        samples = save_pictures(written, recipe.data, split, recipe.evaluation.pictures, dict(models), inference)
        if recipe.method.mask.keep is not None:
            save_masked_pictures(
                samples,
                # The student was trained on masked views, together with its context decoder.
                models.get("student") or next(iter(models.values())),
                recipe.method.mask,
                recipe.run.seed,
                recipe.data.crop_px,
                inference,
            )
        shutil.rmtree(kept, ignore_errors=True)
