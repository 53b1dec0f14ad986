"""Loading the model of a run or of an export alike, with what its users need to know of either."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from maskmatch_scale.checkpoints.finding import opened
from maskmatch_scale.data.images.bands import Band
from maskmatch_scale.errors import UserError
from maskmatch_scale.export.description import read_description
from maskmatch_scale.export.load import load_export
from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import DataRecipe, EvaluationRecipe, Recipe, parse_recipe
from maskmatch_scale.recipe.values import SEGMENTER_FILE
from maskmatch_scale.runs.data import read_run_data, recipe_of
from maskmatch_scale.runs.first_checks import run_of_model
from maskmatch_scale.runs.model import load_model


@dataclass(frozen=True)
class Model:
    """A trained segmenter, and how it is used."""

    segmenter: Segmenter
    """On the CPU, in eval mode, float32."""
    name: str
    """Of its run or export."""
    step: int
    """Optimizer steps that were taken."""
    weights: str
    """`ema` or `student`."""
    classes: tuple[str, ...]
    """Names; there may be fewer than logits."""
    palette: tuple[tuple[int, int, int], ...]
    """RGB, one for each name."""
    crop_px: tuple[int, int]
    """Height and width of the crops it was trained on."""
    evaluation: EvaluationRecipe
    data: DataRecipe
    """Of a run: how its data are fetched. Of an export: the defaults."""
    exif_orientation: bool
    """Whether images are turned as their EXIF orientation says."""
    bands: tuple[Band, ...] = ()
    """By input channel; empty: RGB."""

    def fingerprint(self, most: int | None = None) -> str:
        """Hex digest of the weights that predictions depend on; the same for a run and its export.

        Args:
            most: about how many values of each tensor are read, evenly spread over it; None: all. A few thousand take
                no time in any model, and tell two trainings apart, or two steps of one: a step changes all values of
                what is trained.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.segmenter.state_dict().items()):
            if not name.startswith("context."):
                values = value.flatten()
                if most is not None:
                    values = values[:: max(1, len(values) // most)]
                digest.update(name.encode())
                digest.update(values.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def open_model(
    where: Path, weights: str | None = None, overrides: Sequence[str] = (), *, checksums: bool = True
) -> Model:
    """Load the newest checkpoint of a run, one of its checkpoints, or an export.

    Args:
        where: run directory, a checkpoint folder in one, or a folder that `maskmatch export` wrote.
        weights: `ema` or `student`; None: `ema`, or whatever an export has.
        overrides: ``evaluation.key=value``: keys that replace those that the model was trained with.
        checksums: whether to compare those of all files of a checkpoint, see :func:`opened`.

    Raises:
        UserError: it is neither, it cannot be loaded, it has no such weights, or an override is wrong.
    """
    run = run_of_model(where)
    if run is None:
        return _of_export(where, weights, overrides)
    recipe, data = recipe_of(run, overrides), read_run_data(run)
    with opened(where, checksums=checksums) as checkpoint:
        return Model(
            load_model(run, recipe, weights or "ema", checkpoint),
            run.resolve().name,
            checkpoint.step,
            weights or "ema",
            data.classes,
            data.palette,
            recipe.data.crop_px,
            recipe.evaluation,
            recipe.data,
            recipe.data.exif_orientation,
            data.bands,
        )


def _of_export(where: Path, weights: str | None, overrides: Sequence[str]) -> Model:
    description = read_description(where)
    if weights not in (None, description.weights):
        raise UserError(
            f"--weights {weights}: {where} has the weights {description.weights} alone; leave it out, or name the run"
        )
    recipe = _recipe_around(description.evaluation, str(where / SEGMENTER_FILE), overrides)
    return Model(
        load_export(where),
        where.resolve().name,
        description.step,
        description.weights,
        description.classes,
        description.palette,
        description.image_size,
        recipe.evaluation,
        recipe.data,
        description.exif_orientation,
        description.bands,
    )


def _recipe_around(evaluation: EvaluationRecipe, source: str, overrides: Sequence[str]) -> Recipe:
    """A recipe of defaults with a section `evaluation`, so that its keys are changed and checked as those of a run."""
    content = {
        "data": {"root": "none"},
        "model": {"backbone": "none"},
        "run": {"dir": "none", "steps": 1},
        "evaluation": evaluation.model_dump(mode="json"),
    }
    return parse_recipe(content, source, overrides)
