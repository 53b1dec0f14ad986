"""The model of a run: built from its recipe, and loaded from its checkpoint.

Decision: docs/decisions/0022-models-built-whole.md.
Decision: docs/decisions/0039-deferred-weights-at-zero-3.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.engine.checkpoint import find_checkpoint, load_state, load_weights, weights_file
from maskmatch_scale.errors import UserError
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.deferred import build_deferred
from maskmatch_scale.models.weights import read_own
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.redact import shown
from maskmatch_scale.runs.data import RunData, classes_of_start, read_run_data, recipe_of, run_of


def build_student(
    recipe: Recipe, index: ShardIndex | RunData, *, pretrained: bool = True, deferred: bool = False
) -> Segmenter:
    """Build the segmenter of a recipe, with random weights drawn from the run's seed.

    Args:
        recipe: of the run.
        index: of its data; only the class names are used.
        pretrained: whether to read the weights that `model.pretrained` names.
        deferred: whether to leave out the weights: `Segmenter.deferred` makes them one at a time, the same numbers.

    Raises:
        UserError: the data have more classes than the recipe, the model cannot be built, or a run without labels does
            not start from a trained segmenter.
    """
    model = recipe.model
    num_classes = model.num_classes or len(index.classes)
    start = _start_weights(model.pretrained)
    trained = _trained_start(recipe, start) if pretrained and recipe.data.labelled_count == 0 else None
    if len(index.classes) > num_classes:
        raise UserError(
            f"model.num_classes={num_classes}: the labels of {shown(recipe.data.root)} have {len(index.classes)} "
            "classes; raise it, or leave it out to take theirs"
        )

    def build() -> Segmenter:
        return build_segmenter(
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

    torch.manual_seed(recipe.run.seed)
    try:
        if deferred:
            segmenter, weights = build_deferred(build)
            segmenter.deferred = weights
        else:
            segmenter = build()
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    if trained is not None:
        _check_trained(recipe, segmenter, trained, index.classes)
    return segmenter


def _start_weights(pretrained: bool | str | None) -> bool | str | None:
    """`model.pretrained` for `build_segmenter`: a run or checkpoint is replaced by the file of its newest teacher."""
    if isinstance(pretrained, str) and run_of(Path(pretrained)) is not None:
        return str(weights_file(find_checkpoint(Path(pretrained)), "ema"))
    return pretrained


def _trained_start(recipe: Recipe, start: bool | str | None) -> dict[str, Tensor]:
    """The weights that a run without labels starts from.

    Raises:
        UserError: they are not those of a trained segmenter.
    """
    try:
        state = read_own(Path(start)) if isinstance(start, str) else None
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    if state is None:
        raise UserError(
            f"data.labelled_count=0 with model.pretrained={recipe.model.pretrained}: without labels the teacher must "
            "be a trained segmenter from the start, with its head; name a run of this package, a checkpoint or export"
        )
    return state


def _check_trained(recipe: Recipe, segmenter: Segmenter, state: Mapping[str, Tensor], classes: Sequence[str]) -> None:
    """Refuse a trained start whose head or classes do not fit a run without labels.

    Raises:
        UserError: its head has other tensors, or it was trained on other classes.
    """
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
            f"{given}: it was trained on classes {', '.join(known)}, the index of {shown(recipe.data.root)} has "
            f"{', '.join(classes)}; they must be the same, in the same order"
        )


def open_run(run: Path, weights: str) -> tuple[Recipe, Segmenter, int]:
    """Load the model of a run from its newest checkpoint.

    Args:
        run: run directory.
        weights: `ema` or `student`.

    Returns:
        The recipe, the segmenter (on the CPU, in eval mode), and the checkpoint's optimizer step.

    Raises:
        CheckpointError: `run` is not a run directory, or has no checkpoint yet.
    """
    recipe = recipe_of(run)
    folder = find_checkpoint(run)
    segmenter = build_student(recipe, read_run_data(run), pretrained=False)
    segmenter.load_state_dict(load_weights(folder, weights))
    return recipe, segmenter.eval(), int(load_state(folder)["step"])
