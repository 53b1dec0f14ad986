"""A run's model: built from its recipe, loaded from its checkpoint, evaluated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from maskmatch_scale.data.index import ShardIndex
from maskmatch_scale.engine.checkpoint import CheckpointError, find_checkpoint, load_weights
from maskmatch_scale.errors import UserError
from maskmatch_scale.evaluation.evaluate import Window, evaluate_split
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.evaluation.pictures import save_masked_pictures, save_pictures
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.recipe import Recipe, load_recipe


def build_student(recipe: Recipe, index: ShardIndex, *, pretrained: bool = True) -> Segmenter:
    """The segmenter of a recipe, its random weights drawn from the run's seed; ``pretrained=False`` reads no others.

    Raises:
        UserError: the data have more classes than the recipe, or the model cannot be built so.
    """
    model = recipe.model
    num_classes = model.num_classes or len(index.classes)
    if len(index.classes) > num_classes:
        raise UserError(
            f"model.num_classes={num_classes}: the labels of {recipe.data.root} have {len(index.classes)} classes; "
            "raise it, or leave it out to take theirs"
        )
    torch.manual_seed(recipe.run.seed)
    try:
        return build_segmenter(
            model.backbone,
            num_classes,
            head=model.head,
            pretrained=model.pretrained if pretrained else None,
            image_size=recipe.data.crop_px,
            unit_px=model.unit_px,
            context=recipe.method.mask.keep is not None and recipe.method.mask.mode == "drop",
            checkpoint_activations=recipe.engine.activation_checkpointing,
            backbone_options=model.backbone_options,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def window_of(recipe: Recipe, segmenter: Segmenter, device: torch.device) -> Window:
    """How held-out images are cut for this run."""
    dtype = next(segmenter.parameters()).dtype
    return Window(recipe.data.crop_px, recipe.evaluation, segmenter.mean, segmenter.std, device, dtype)


def open_run(run: Path, weights: str) -> tuple[Recipe, Segmenter, int]:
    """Recipe, segmenter in eval mode with the newest checkpoint's weights, and that checkpoint's step.

    Args:
        run: run directory.
        weights: `ema` or `student`.

    Raises:
        CheckpointError: not a run directory, or no checkpoint in it yet.
    """
    recipe = _recipe_of(run)
    folder = find_checkpoint(run)
    segmenter = build_student(recipe, ShardIndex.load(recipe.data.root), pretrained=False)
    segmenter.load_state_dict(load_weights(folder, weights))
    step = json.loads((folder / "state.json").read_text())["step"]
    return recipe, segmenter.eval(), int(step)


def held_out_images(run: Path, split: str) -> int:
    """How many images a run's data hold in ``split``.

    Raises:
        ValueError: no run, or no such stream.
    """
    return ShardIndex.load(_recipe_of(run).data.root).stream(split).samples


def _recipe_of(run: Path) -> Recipe:
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(f"{run}: not a run directory (no recipe.yaml)")
    return load_recipe(run / "recipe.yaml")


def evaluate_run(
    run: Path, split: str, weights: tuple[str, ...], progress: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Evaluate a run's newest checkpoint, keep figures in `RUN/evaluation` and pictures in `RUN/pictures`.

    Args:
        run: run directory.
        split: stream name.
        weights: which of `ema`, `student`.
        progress: called after every image.

    Returns:
        One record a kind of weights: split, weights, step, miou, pixel_accuracy, iou (by class, None where a class does
        not occur), images, seconds.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records, models = [], {}
    for kind in weights:
        began = time.monotonic()
        recipe, segmenter, step = open_run(run, kind)
        index = ShardIndex.load(recipe.data.root)
        models[kind] = segmenter.to(device)
        matrix = ConfusionMatrix(segmenter.num_classes, index.ignore_index)
        window = window_of(recipe, segmenter, device)
        images = evaluate_split(segmenter, recipe.data.root, split, window, matrix, progress=progress)
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
        _write_json(run / "evaluation" / f"{split}-{kind}.json", record)
        records.append(record)
    samples = save_pictures(
        run / "pictures" / split, recipe.data.root, split, recipe.evaluation.pictures, dict(models), window
    )
    if recipe.method.mask.keep is not None:
        # The student is what was trained on masks; its context decoder belongs to it.
        save_masked_pictures(samples, models.get("student", segmenter), recipe.method.mask, recipe.run.seed, window)
    return records


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".writing")
    beside.write_text(json.dumps(record, indent=1))
    beside.rename(path)
