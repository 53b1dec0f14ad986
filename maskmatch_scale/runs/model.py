"""A run's model: built from its recipe, and loaded from its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.engine.checkpoint import find_checkpoint, load_weights
from maskmatch_scale.errors import UserError
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.weights import read_own
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.runs.data import RunData, classes_of_start, read_run_data, recipe_of, run_of


def build_student(recipe: Recipe, index: ShardIndex | RunData, *, pretrained: bool = True) -> Segmenter:
    """The segmenter of a recipe, its random weights drawn from the run's seed; ``pretrained=False`` reads no others.

    Raises:
        UserError: the data have more classes than the recipe, the model cannot be built so, or a run without labels
            starts from weights that are no trained segmenter's.
    """
    model = recipe.model
    num_classes = model.num_classes or len(index.classes)
    start = _start_weights(model.pretrained)
    trained = _trained_start(recipe, start) if pretrained and recipe.data.labelled_count == 0 else None
    if len(index.classes) > num_classes:
        raise UserError(
            f"model.num_classes={num_classes}: the labels of {recipe.data.root} have {len(index.classes)} classes; "
            "raise it, or leave it out to take theirs"
        )
    torch.manual_seed(recipe.run.seed)
    try:
        segmenter = build_segmenter(
            model.backbone,
            num_classes,
            head=model.head,
            pretrained=start if pretrained else None,
            image_size=recipe.data.crop_px,
            unit_px=model.unit_px,
            context=recipe.method.mask.keep is not None and recipe.method.mask.mode == "drop",
            checkpoint_activations=recipe.engine.activation_checkpointing,
            backbone_options=model.backbone_options,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    if trained is not None:
        _check_trained(recipe, segmenter, trained, index.classes)
    return segmenter


def _start_weights(pretrained: bool | str | None) -> bool | str | None:
    """What `model.pretrained` means; of a run the teacher of its newest checkpoint, context decoder and all."""
    if isinstance(pretrained, str) and run_of(Path(pretrained)) is not None:
        return str(find_checkpoint(Path(pretrained)) / "ema.safetensors")
    return pretrained


def _trained_start(recipe: Recipe, start: bool | str | None) -> dict[str, Tensor]:
    """Weights that a run without labels starts from: a trained segmenter's, or an error."""
    try:
        state = read_own(Path(start)) if isinstance(start, str) else None
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    if state is None:
        raise UserError(
            f"data.labelled_count=0 with model.pretrained={recipe.model.pretrained}: without labels the teacher must "
            "be a trained segmenter from the start, head and all; give a run of this package, a checkpoint or an export"
        )
    return state


def _check_trained(recipe: Recipe, segmenter: Segmenter, state: Mapping[str, Tensor], classes: Sequence[str]) -> None:
    """Refuse a start whose head does not fit, or says other classes, for a run without labels."""
    given = f"data.labelled_count=0 with model.pretrained={recipe.model.pretrained}"
    for name, value in segmenter.state_dict().items():
        if name.startswith("head.") and (name not in state or state[name].shape != value.shape):
            raise UserError(
                f"{given}: its head does not fit ({name}), and without labels a new one would never be trained; "
                "model.head and the number of classes must be those of the start"
            )
    known = classes_of_start(recipe)["classes"]
    if recipe.model.num_classes is None and list(known) != list(classes):
        raise UserError(
            f"{given}: it was trained on classes {', '.join(known)}, the index of {recipe.data.root} has "
            f"{', '.join(classes)}; they must be the same, in the same order"
        )


def open_run(run: Path, weights: str) -> tuple[Recipe, Segmenter, int]:
    """Recipe, segmenter in eval mode with the newest checkpoint's weights, and that checkpoint's step.

    Args:
        run: run directory.
        weights: `ema` or `student`.

    Raises:
        CheckpointError: not a run directory, or no checkpoint in it yet.
    """
    recipe = recipe_of(run)
    folder = find_checkpoint(run)
    segmenter = build_student(recipe, read_run_data(run), pretrained=False)
    segmenter.load_state_dict(load_weights(folder, weights))
    step = json.loads((folder / "state.json").read_text())["step"]
    return recipe, segmenter.eval(), int(step)
