"""From a recipe to what is planned: models on the meta device, precision, and the counts that the data give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.bands import RGB_NAMES, Band
from maskmatch_scale.data.shards.folder import channels_of, load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.engine.precision import Precision, precision_for
from maskmatch_scale.engine.zero import deepspeed_config
from maskmatch_scale.errors import UserError
from maskmatch_scale.export.opening import open_model
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.planning.hardware import has_bf16, is_cpu
from maskmatch_scale.planning.setting import Gpu
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.learning import makes_views, uses_unlabelled
from maskmatch_scale.recipe.soundness import unsound
from maskmatch_scale.runs.data import RunData, describe_data, read_run_data, recipe_of, run_of
from maskmatch_scale.runs.model import build_student
from maskmatch_scale.runs.model_checks import check_backbone, check_model, freeze

ASSUMED_CLASSES = 21
"""Of Pascal VOC; for a recipe that does not say them, without its data."""


@dataclass(frozen=True)
class Built:
    """A subject, and what was found or assumed on the way."""

    subject: Subject
    asked: Recipe
    """As it was loaded."""
    gpu: Gpu
    data: RunData
    """Of which the names of classes are used."""
    index: ShardIndex | None
    """Of `data.root`; None: it cannot be read here."""
    students: dict[bool, Segmenter]
    """Without and with activation checkpointing, as they were needed so far."""
    notes: tuple[str, ...]
    """For people: what was assumed, what could not be read, why this precision."""


def build(recipe: Recipe, gpu: Gpu, classes: int | None = None) -> Built:
    """Build the models of a recipe without weights.

    Args:
        recipe: as it was loaded.
        gpu: that it would run on.
        classes: for data that cannot be read; None: `model.num_classes`, or else :data:`ASSUMED_CLASSES`.

    Raises:
        UserError: the recipe cannot be run at all, on any number of GPUs: names the key and what to do.
    """
    notes: list[str] = []
    index = _index(recipe, notes)
    data = _data(recipe, index, classes, notes)
    check_backbone(recipe)
    student = _student(recipe, data)
    check_model(recipe, student)
    precision, why = _precision(recipe, gpu, student)
    notes.append(f"precision {precision}: {why}")
    teacher = _frozen_teacher(recipe, data, notes)
    subject = _subject(_with_engine(recipe, precision=precision), student, teacher, gpu)
    students = {recipe.engine.activation_checkpointing: student}
    return Built(subject, recipe, gpu, data, index, students, tuple(notes))


def rebuilt(built: Built, ranks: int, **engine: Any) -> Subject | None:
    """The subject with other settings of the section `engine`; None: they are refused together.

    With `engine.precision` auto the precision is chosen for these settings.

    Args:
        built: of the recipe.
        ranks: how many, which `engine.deepspeed_json` may depend on.
        engine: keys of the section.
    """
    recipe = _with_engine(built.asked, **engine)
    if any(refused for refused, _ in unsound(recipe)):
        return None
    before = built.subject
    again = recipe.engine.activation_checkpointing
    # Passes are traced once for each student: so there is one with checkpointing, and one without.
    student = built.students.get(again)
    if student is None:
        student = built.students[again] = _student(recipe, built.data)
    try:
        precision, _ = _precision(recipe, built.gpu, student)
    except UserError:
        return None
    recipe = _with_engine(recipe, precision=precision)
    if recipe.engine == before.recipe.engine:
        return before
    if any(refused for refused, _ in unsound(recipe)) or not _agrees(recipe, ranks):
        return None
    return replace(_subject(recipe, student, before.frozen_teacher, built.gpu), like=before.like or before.student)


def _agrees(recipe: Recipe, ranks: int) -> bool:
    """Whether `engine.deepspeed_json`, written for the recipe's own settings, allows these."""
    try:
        deepspeed_config(recipe, ranks)
    except UserError:
        return False
    return True


def _with_engine(recipe: Recipe, **keys: Any) -> Recipe:
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=keys)})


def _student(recipe: Recipe, data: RunData) -> Segmenter:
    with torch.device("meta"):
        student = build_student(recipe, data, pretrained=False)
    freeze(recipe, student)
    return student


def _precision(recipe: Recipe, gpu: Gpu, student: Segmenter) -> tuple[Precision, str]:
    batchnorm = any(isinstance(module, _BatchNorm) for module in student.modules())
    return precision_for(recipe, None if is_cpu(gpu) else gpu.name, has_bf16=has_bf16(gpu), batchnorm=batchnorm)


def _subject(recipe: Recipe, student: Segmenter, teacher: Segmenter | None, gpu: Gpu) -> Subject:
    engine, method = recipe.engine, recipe.method
    labelled = 0 if recipe.data.labelled_count == 0 else engine.micro_batch
    unlabelled = 0
    if uses_unlabelled(method):
        unlabelled = engine.micro_batch * recipe.data.unlabelled_per_labelled
    elif makes_views(method):
        unlabelled = engine.micro_batch
    device: Literal["cuda", "cpu"] = "cpu" if is_cpu(gpu) else "cuda"
    return Subject(recipe, student, teacher, labelled, unlabelled, device)


def _index(recipe: Recipe, notes: list[str]) -> ShardIndex | None:
    # One quick try: a plan is also made where the data are not.
    data = recipe.data.model_copy(update={"fetch_attempts": 1, "fetch_timeout_s": 10.0})
    try:
        return load_index(recipe.data.root, data)
    except (DataError, OSError) as error:
        notes.append(f"data.root cannot be read here, so counts of samples are unknown: {error}")
        return None


def _data(recipe: Recipe, index: ShardIndex | None, classes: int | None, notes: list[str]) -> RunData:
    if index is not None and (index.classes or classes is None):
        return describe_data(recipe, index)
    count = classes or recipe.model.num_classes
    if count is None:
        count = ASSUMED_CLASSES
        notes.append(f"{count} classes assumed; say --classes N, or model.num_classes=N")
    names = tuple(f"class {number}" for number in range(count))
    return RunData(
        source="",
        classes=names,
        palette=((0, 0, 0),) * count,
        ignore_index=255,
        bands=_bands(recipe, index),
        samples={},
    )


def _bands(recipe: Recipe, index: ShardIndex | None) -> tuple[Band, ...]:
    """Bands by channel; of data that cannot be read those that the recipe names, whose ranges cost nothing.

    Raises:
        UserError: the index has not the bands that the recipe names.
    """
    if index is not None:
        channels = channels_of(index, recipe.data)
        return () if channels is None else channels.bands
    names = recipe.data.channels
    return () if names in (None, RGB_NAMES) else tuple(Band(name, 0, 255) for name in names)


def _frozen_teacher(recipe: Recipe, data: RunData, notes: list[str]) -> Segmenter | None:
    """The model that `method.teacher` names, by the recipe of its run; of an export, by what lies beside its weights.

    Raises:
        UserError: there is none.
    """
    path = recipe.method.frozen_teacher
    if path is None or not uses_unlabelled(recipe.method):
        return None
    run = run_of(Path(path))
    if run is not None:
        with torch.device("meta"):
            built = build_student(recipe_of(run), read_run_data(run), pretrained=False)
        return built.requires_grad_(False)
    if not Path(path).exists():
        notes.append(f"method.teacher={path} is not here: a model like the student is planned in its place")
        model = recipe.model
        with torch.device("meta"):
            like = build_segmenter(
                model.backbone,
                len(data.classes),
                head=model.head,
                unit_px=model.unit_px,
                context=False,
                backbone_options=model.backbone_options,
                in_channels=[band.name for band in data.bands] or 3,
            )
        return like.requires_grad_(False)
    return open_model(Path(path), checksums=False).segmenter.to("meta").requires_grad_(False)
