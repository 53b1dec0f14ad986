"""What a run's model has to do with its data: `RUN/data.json`, for when the data are elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import load_index
from maskmatch_scale.engine.checkpoint import CheckpointError
from maskmatch_scale.errors import UserError
from maskmatch_scale.models.weights import SEGMENTER_FILE
from maskmatch_scale.recipe import Recipe, load_recipe
from maskmatch_scale.record.run_folder import RunFolder


class RunData(BaseModel):
    """The contents of `RUN/data.json`."""

    model_config = ConfigDict(frozen=True)

    source: str
    """Name of what wrote the shards."""
    classes: tuple[str, ...]
    """Class names; where no shard has labels, those of the model that the run started from."""
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int
    samples: dict[str, int]
    """Of every stream of `data.root`; `labelled` and `unlabelled`: those that training used, of all sources."""


def describe_data(recipe: Recipe, index: ShardIndex, used: Mapping[str, int] | None = None) -> RunData:
    """What a run needs to know of its data.

    Args:
        recipe: of the run.
        index: of `data.root`.
        used: labelled and unlabelled samples that training uses, where that is known.

    Raises:
        UserError: nothing names the classes.
    """
    named = index.model_dump(include={"source", "classes", "palette", "ignore_index"})
    if not index.classes:
        named |= classes_of_start(recipe)
    samples = {name: stream.samples for name, stream in index.streams.items()} | dict(used or {})
    return RunData(**named, samples=samples)


def read_run_data(run: Path) -> RunData:
    """Read `RUN/data.json`; of a run that has none, what the index of its data says.

    Raises:
        UserError: neither can be read.
    """
    path = RunFolder(run).data
    if not path.is_file():
        recipe = recipe_of(run)
        return describe_data(recipe, load_index(recipe.data.root, recipe.data))
    try:
        return RunData.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: {error.errors()[0]['msg']}; it cannot be read") from None


def classes_of_start(recipe: Recipe) -> dict[str, Any]:
    """Classes of the run or export that `model.pretrained` names; unnamed ones if only `model.num_classes` is known."""
    start = recipe.model.pretrained
    wanted = {"classes", "palette", "ignore_index"}
    if isinstance(start, str):
        run = run_of(Path(start))
        if run is not None:
            return read_run_data(run).model_dump(include=wanted)
        described = Path(start) / SEGMENTER_FILE
        if described.is_file():
            content = json.loads(described.read_text())
            return {name: content[name] for name in wanted}
    if recipe.model.num_classes is None:
        raise UserError(
            f"data.root={recipe.data.root}: its index names no classes; start from a run or an export, which do "
            "(model.pretrained), or say how many there are (model.num_classes)"
        )
    return {
        "classes": [f"class {value}" for value in range(recipe.model.num_classes)],
        "palette": [_grey(value, recipe.model.num_classes) for value in range(recipe.model.num_classes)],
    }


def _grey(value: int, of: int) -> tuple[int, int, int]:
    level = 255 * value // max(1, of - 1)
    return level, level, level


def run_of(path: Path) -> Path | None:
    """The run directory that a path names, or that the checkpoint it names lies in."""
    return next((folder for folder in (path, path.parent.parent) if RunFolder(folder).recipe.is_file()), None)


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run, as it was trained.

    Raises:
        CheckpointError: not a run directory.
    """
    path = RunFolder(run).recipe
    if not path.is_file():
        raise CheckpointError(f"{run}: not a run directory (no {path.name})")
    return load_recipe(path)
