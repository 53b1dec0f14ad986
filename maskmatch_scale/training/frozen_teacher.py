"""`method.teacher: PATH`: opened, and compared with the data and with the checkpoint that a run continues from.

Decision: docs/decisions/0062-frozen-teacher.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskmatch_scale.checkpoints.finding import Checkpoint
from maskmatch_scale.data.images.bands import Band, in_words
from maskmatch_scale.errors import UserError
from maskmatch_scale.export.opening import Model, open_model
from maskmatch_scale.method.bases import base_class
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.learning import uses_unlabelled
from maskmatch_scale.redact import shown
from maskmatch_scale.runs.data import class_difference, run_of

_SAMPLED = 4096
"""Values of each tensor by which teachers are told apart: reading all of a large one would take seconds a start."""


def open_teacher(recipe: Recipe) -> Model | None:
    """Load the frozen teacher; None: the average of the student labels, or nothing looks at unlabelled images.

    Checksums are not compared, as for `model.pretrained`: every rank reads it, and those of a run cover its optimizer.

    Raises:
        UserError: there is no run, checkpoint or export under the path, it cannot be loaded, or it is of this very run.
    """
    path = recipe.method.frozen_teacher
    if path is None or not uses_unlabelled(recipe.method):
        return None
    given = f"method.teacher={path}"
    if not Path(path).exists():
        raise UserError(
            f"{given}: there is nothing under this path; name a run, a checkpoint in one, an export, or ema"
        )
    run = run_of(Path(path))
    if run is not None and run.resolve() == Path(recipe.run.dir).resolve():
        raise UserError(
            f"{given}: that is the directory of this run (run.dir), which it will write to; set another run.dir"
        )
    try:
        return open_model(Path(path), checksums=False)
    except UserError as error:
        raise UserError(f"{given}: {str(error).removeprefix(f'{path}: ')}") from error


def check_classes(recipe: Recipe, teacher: Model, classes: Sequence[str]) -> None:
    """Refuse a teacher whose labels mean something else than those of the data, or that knows more classes.

    It may know fewer, unless the base's loss needs the probabilities of all.

    Args:
        recipe: of the run.
        teacher: opened.
        classes: of the data.

    Raises:
        UserError: names the first classes that differ, or the numbers of classes.
    """
    given = f"method.teacher={recipe.method.teacher}"
    difference = class_difference(teacher.classes, classes)
    if difference is not None:
        raise UserError(
            f"{given}: its classes are not those of {shown(recipe.data.root)} in the same order ({difference}); name a "
            "model that was trained on these classes"
        )
    outputs, own = teacher.segmenter.num_classes, recipe.model.num_classes or len(classes)
    if outputs > own:
        raise UserError(
            f"{given}: it tells {outputs} classes apart, and the student {own}; set model.num_classes={outputs}"
        )
    base = recipe.method.base
    if outputs < own and base_class(base).needs_probabilities:
        raise UserError(
            f"{given} with method.base={base}: its loss compares probabilities of all classes, and the teacher tells "
            f"{outputs} apart, the student {own}; set model.num_classes={outputs}, or use method.base=fixmatch"
        )


def check_bands(recipe: Recipe, teacher: Model, bands: Sequence[Band]) -> None:
    """Refuse a teacher that sees other channels than the student, or other ranges of their values.

    Args:
        recipe: of the run.
        teacher: opened.
        bands: of the data, by channel of the student; empty: RGB.

    Raises:
        UserError: names the channels of both.
    """
    if teacher.bands != tuple(bands):
        theirs, ours = (", ".join(in_words(each)) for each in (teacher.bands, bands))
        raise UserError(
            f"method.teacher={recipe.method.teacher}: its channels are {theirs}, and those of the data {ours}; both "
            "see the same images, so name a model of these channels (data.channels, data.value_ranges)"
        )


def teacher_facts(recipe: Recipe, teacher: Model) -> dict[str, Any]:
    """What `state.json` says of a frozen teacher. A run continues with the same `weights`, under any path."""
    facts = {"path": recipe.method.teacher, "name": teacher.name, "step": teacher.step}
    return facts | {"weights": teacher.fingerprint(_SAMPLED)}


def check_same_teacher(checkpoint: Checkpoint, recipe: Recipe, facts: Mapping[str, Any] | None) -> None:
    """Refuse to continue a checkpoint with another teacher than it was trained with.

    Where nothing looks at unlabelled images, nothing is compared.

    Args:
        checkpoint: to continue from.
        recipe: of the run.
        facts: :func:`teacher_facts` of its frozen teacher; None: it has none.

    Raises:
        UserError: one line that names both.
    """
    before = checkpoint.state.get("frozen_teacher")
    if not uses_unlabelled(recipe.method) or (before and before["weights"]) == (facts and facts["weights"]):
        return
    was = f"{before['path']} (step {before['step']})" if before else "the average of the student (ema)"
    now = f", and this is step {facts['step']}" if before and facts and before["path"] == facts["path"] else ""
    raise UserError(
        f"method.teacher={recipe.method.teacher}: {checkpoint.folder} was trained with another teacher, {was}{now}; "
        "continue with that one (the values of its weights are compared), or start a new run from its weights "
        "(model.pretrained)"
    )
