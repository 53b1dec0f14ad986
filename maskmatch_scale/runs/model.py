"""The model of a run: built from its recipe, and loaded from its checkpoint.

Decision: docs/decisions/0022-models-built-whole.md.
Decision: docs/decisions/0039-deferred-weights-at-zero-3.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskmatch_scale.checkpoints.finding import Checkpoint, find, old_teacher, opened
from maskmatch_scale.checkpoints.layout import INDEX, CheckpointError
from maskmatch_scale.checkpoints.reading import Weights, load_weights
from maskmatch_scale.data.images.bands import Band, in_words
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.errors import UserError
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.deferred import build_deferred
from maskmatch_scale.models.weights import read_own
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.redact import shown
from maskmatch_scale.runs.data import (
    RunData,
    class_difference,
    classes_of_start,
    known_bands,
    known_classes,
    read_run_data,
    recipe_of,
    run_of,
)


def build_student(
    recipe: Recipe, index: ShardIndex | RunData, *, pretrained: bool = True, deferred: bool = False
) -> Segmenter:
    """Build the segmenter of a recipe, with random weights drawn from the run's seed.

    Args:
        recipe: of the run.
        index: of its data: class names and bands, one for each input channel.
        pretrained: whether to read the weights that `model.pretrained` names.
        deferred: whether to leave out the weights: `Segmenter.deferred` makes them one at a time, the same numbers.

    Raises:
        UserError: the data have more classes than the recipe, the model cannot be built, or a run without labels has
            neither a frozen teacher nor a trained segmenter as its start.
    """
    model = recipe.model
    num_classes = model.num_classes or len(index.classes)
    start = _start_weights(model.pretrained)
    own_teacher = recipe.data.labelled_count == 0 and recipe.method.frozen_teacher is None
    trained = _trained_start(recipe, start) if pretrained and own_teacher else None
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
            unit_px=model.unit_px,
            context=bool(recipe.method.dropped),
            checkpoint_activations=recipe.engine.activation_checkpointing,
            backbone_options=model.backbone_options,
            in_channels=[band.name for band in index.bands] or 3,
        )

    torch.manual_seed(recipe.run.seed)
    try:
        if deferred:
            segmenter, weights = build_deferred(build)
            segmenter.deferred = weights
        else:
            segmenter = build()
    except ValueError as error:
        text = str(error)
        raise UserError(text if text.startswith("model.") else f"model: {text}") from error
    notes = [f"model.pretrained={model.pretrained}: {line}" for line in segmenter.start_notes]
    if pretrained and (line := _other_classes(recipe, segmenter, index.classes)):
        notes.append(line)
    if pretrained and (line := _other_bands(recipe, index.bands)):
        notes.append(f"warning: {line}; the stem is loaded all the same")
    segmenter.start_notes = tuple(notes)
    if trained is not None:
        if line := _other_bands(recipe, index.bands):
            raise UserError(f"data.labelled_count=0: {line}; without labels a teacher must know the channels")
        _check_trained(recipe, segmenter, trained, index.classes)
    return segmenter


def _other_classes(recipe: Recipe, segmenter: Segmenter, classes: Sequence[str]) -> str | None:
    """A line for a run that starts with the classifier of other classes, of the same number or in another order."""
    start = recipe.model.pretrained
    known = known_classes(start) if isinstance(start, str) else None
    is_new = any(line.startswith(("classifier:", "new, at random:")) for line in segmenter.start_notes)
    if known is None or is_new or len(known) != segmenter.num_classes:
        return None
    difference = class_difference(known[: len(classes)], classes)
    return difference and (
        f"warning: model.pretrained={start}: its classes are others or in another order ({difference}); the "
        "classifier is loaded all the same"
    )


def _other_bands(recipe: Recipe, bands: Sequence[Band]) -> str | None:
    """What to say of a run that starts from a model of other channels, or of other ranges of their values."""
    start = recipe.model.pretrained
    known = known_bands(start) if isinstance(start, str) else None
    if known is None or known == tuple(bands):
        return None
    theirs, ours = (", ".join(in_words(each)) for each in (known, bands))
    return f"model.pretrained={start}: its channels are {theirs}, and those of this run {ours}"


def _start_weights(pretrained: bool | str | None) -> bool | str | Weights | None:
    """`model.pretrained` for `build_segmenter`: a run or checkpoint is replaced by its newest teacher."""
    if not isinstance(pretrained, str):
        return pretrained
    path = Path(pretrained)
    if run_of(path) is None and not (path / INDEX).is_file():
        return pretrained
    old = old_teacher(path)
    # Every rank reads it: comparing the checksums of all files on each of them would take too long.
    return load_weights(find(path).folder, "ema") if old is None else str(old)


def _trained_start(recipe: Recipe, start: bool | str | Weights | None) -> Mapping[str, Tensor]:
    """The weights that a run without labels starts from.

    Raises:
        UserError: they are not those of a trained segmenter.
    """
    if isinstance(start, Weights):
        return start
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
    """Load the model of a run from its newest checkpoint that is whole.

    Args:
        run: run directory.
        weights: `ema` or `student`.

    Returns:
        The recipe, the segmenter (on the CPU, in eval mode), and the checkpoint's optimizer step.

    Raises:
        CheckpointError: `run` is not a run directory, has no checkpoint yet, or one that does not fit its recipe.
    """
    recipe = recipe_of(run)  # a path that is no run is named as such
    with opened(run) as checkpoint:
        return recipe, load_model(run, recipe, weights, checkpoint), checkpoint.step


def load_model(run: Path, recipe: Recipe, weights: str, checkpoint: Checkpoint) -> Segmenter:
    """Load the model of a run from one of its checkpoints.

    Args:
        run: run directory.
        recipe: of the run.
        weights: `ema` or `student`.
        checkpoint: that is `opened`.

    Returns:
        The segmenter, on the CPU, in eval mode.

    Raises:
        CheckpointError: the checkpoint does not fit the recipe.
    """
    segmenter = build_student(recipe, read_run_data(run), pretrained=False)
    stored = load_weights(checkpoint.folder, weights)
    check_shapes(checkpoint.folder, stored, segmenter)
    with torch.no_grad():
        for name, value in segmenter.state_dict().items():
            value.copy_(stored[name])  # one at a time, so that the model is in memory once
    return segmenter.eval()


def check_shapes(folder: Path, stored: Weights, segmenter: Segmenter) -> None:
    """Refuse weights that do not fit the run's model, because recipe or data were changed after training.

    Args:
        folder: of the checkpoint.
        stored: its weights.
        segmenter: of the recipe, on any device.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    expected = {name: tuple(value.shape) for name, value in segmenter.state_dict().items()}
    found = {name: stored.shape(name) for name in stored}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name, remedy = wrong[0], "restore the files that the run was trained with"
        if name == "backbone.pos_embed" and len(wrong) == 1:
            remedy += (
                "; if it is of before position embeddings kept their own grid, add model.backbone_options.img_size"
            )
            remedy += " to recipe.yaml, with the value of data.crop_px"
        raise CheckpointError(
            f"{folder}: {name} has shape {found.get(name)}, but recipe.yaml and data.json give "
            f"{expected.get(name)}; {remedy}"
        )
