"""From a recipe to what is planned: models on the meta device, precision, and the counts that the data give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.engine.precision import precision_for
from maskmatch_scale.export.opening import open_model
from maskmatch_scale.method.maskmatch import makes_views, uses_unlabelled
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.planning.hardware import has_bf16, is_cpu
from maskmatch_scale.planning.setting import Gpu
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.runs.data import RunData, describe_data, read_run_data, recipe_of, run_of
from maskmatch_scale.runs.model import build_student
from maskmatch_scale.runs.model_checks import check_backbone, check_model, freeze

ASSUMED_CLASSES = 21
"""Of Pascal VOC; for a recipe that does not say them, without its data."""


@dataclass(frozen=True)
class Built:
    """A subject, and what was found or assumed on the way."""

    subject: Subject
    index: ShardIndex | None
    """Of `data.root`; None: it cannot be read here."""
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
    with torch.device("meta"):
        student = build_student(recipe, data, pretrained=False)
    freeze(recipe, student)
    check_model(recipe, student)
    batchnorm = any(isinstance(module, _BatchNorm) for module in student.modules())
    name = None if is_cpu(gpu) else gpu.name
    precision, why = precision_for(recipe, name, has_bf16=has_bf16(gpu), batchnorm=batchnorm)
    notes.append(f"precision {precision}: {why}")
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"precision": precision})})
    teacher = _frozen_teacher(recipe, data, notes)
    engine, per = recipe.engine, recipe.data.unlabelled_per_labelled
    labelled = 0 if recipe.data.labelled_count == 0 else engine.micro_batch
    views = makes_views(recipe.method)
    unlabelled = engine.micro_batch * per if uses_unlabelled(recipe.method) else engine.micro_batch if views else 0
    return Built(Subject(recipe, student, teacher, labelled, unlabelled), index, tuple(notes))


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
    return RunData(source="", classes=names, palette=((0, 0, 0),) * count, ignore_index=255, samples={})


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
            )
        return like.requires_grad_(False)
    return open_model(Path(path), checksums=False).segmenter.to("meta").requires_grad_(False)
