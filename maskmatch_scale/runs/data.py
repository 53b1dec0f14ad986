"""`RUN/data.json`: what the model of a run must know of its data, when the data themselves are not there.

Decision: docs/decisions/0008-data-json-in-the-run.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from maskmatch_scale.checkpoints.layout import CheckpointError
from maskmatch_scale.data.images.bands import RGB_NAMES, Band, choose_channels
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import Recipe, load_recipe
from maskmatch_scale.recipe.values import SEGMENTER_FILE
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.redact import shown


class RunData(BaseModel):
    """The contents of `RUN/data.json`."""

    model_config = ConfigDict(frozen=True)

    source: str
    """Name of the data source that wrote the shards."""
    classes: tuple[str, ...]
    """Class names. If the index names none, those of the model that the run started from."""
    palette: tuple[tuple[int, int, int], ...]
    """One RGB colour for each class, 0–255."""
    ignore_index: int
    """Label value of pixels that are not counted."""
    bands: tuple[Band, ...] = ()
    """What the model's input channels are, in their order; empty: red, green and blue of 8 bits."""
    samples: dict[str, int]
    """Number of samples in each stream of `data.root`. For `labelled` and `unlabelled`: the number that training
    used, over all sources; no `unlabelled` if some of these have no index."""

    def to_json(self) -> str:
        """The contents of the file; nothing is said of the channels of RGB."""
        return self.model_dump_json(indent=1, exclude=None if self.bands else {"bands"})


def describe_data(recipe: Recipe, index: ShardIndex, used: Mapping[str, int | None] | None = None) -> RunData:
    """Describe the data of a run.

    Args:
        recipe: of the run.
        index: of `data.root`.
        used: number of `labelled` and of `unlabelled` samples that training uses; None where nobody knows it.

    Raises:
        UserError: neither the index nor the model that the run starts from names the classes, or the index has not the
            bands that the recipe names.
    """
    named = index.model_dump(include={"source", "classes", "palette", "ignore_index"})
    try:
        channels = choose_channels(index.bands, recipe.data.channels, recipe.data.value_ranges)
    except ValueError as error:
        raise UserError(f"{error} (data.root={shown(recipe.data.root)})") from None
    named["bands"] = () if channels is None else channels.bands
    if not index.classes:
        named |= classes_of_start(recipe)
    samples = {name: stream.samples for name, stream in index.streams.items()} | dict(used or {})
    known = {name: count for name, count in samples.items() if count is not None}
    return RunData(**named, samples=known)


def with_bands(recipe: Recipe, data: RunData) -> Recipe:
    """The recipe of a run with the bands and ranges that its model was trained with, whatever an index says by now.

    Data that lack one of the bands are refused when they are opened
    (:func:`~maskmatch_scale.data.shards.folder.channels_of`).

    Args:
        recipe: of the run.
        data: of the run.
    """
    pinned = {
        "channels": tuple(band.name for band in data.bands) or RGB_NAMES,
        "value_ranges": {band.name: (band.low, band.high) for band in data.bands},
    }
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=pinned)})


def read_run_data(run: Path) -> RunData:
    """Read `RUN/data.json`. If the run has none, read the index of its data.

    Raises:
        UserError: `data.json` is not valid, or `run` is not a run directory.
        DataError: there is no `data.json`, and the index cannot be read.
    """
    path = RunFolder(run).data
    if not path.is_file():
        recipe = recipe_of(run)
        return describe_data(recipe, load_index(recipe.data.root, recipe.data))
    try:
        return RunData.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: it cannot be read: {error.errors()[0]['msg']}") from None


def classes_of_start(recipe: Recipe) -> dict[str, Any]:
    """Class names and palette of the model that a run learns from, as fields of :class:`RunData`.

    They come from the run or export that `method.teacher` names, or else `model.pretrained`. If neither does, the
    classes get numbers as names and grey values as colours.

    Raises:
        UserError: they name no run or export, and `model.num_classes` is not given.
    """
    start = recipe.method.frozen_teacher or recipe.model.pretrained
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
            f"data.root={shown(recipe.data.root)}: its index names no classes; start from a run or an export, which "
            "name them (model.pretrained), or give their number (model.num_classes)"
        )
    return {
        "classes": [f"class {value}" for value in range(recipe.model.num_classes)],
        "palette": [_grey(value, recipe.model.num_classes) for value in range(recipe.model.num_classes)],
    }


def class_difference(theirs: Sequence[str], ours: Sequence[str]) -> str | None:
    """In which class numbers two lists of names differ, in words for a message; None: in none."""
    pairs = enumerate(zip_longest(theirs, ours))
    differ = [
        f"{number} is {_name(one)} there and {_name(other)} here" for number, (one, other) in pairs if one != other
    ]
    more = f", and {len(differ) - 3} more differ" if len(differ) > 3 else ""
    return ", ".join(differ[:3]) + more if differ else None


def _name(label: str | None) -> str:
    return "missing" if label is None else repr(label)


def known_classes(pretrained: str) -> tuple[str, ...] | None:
    """Class names of the run, export or folder of transformers that `model.pretrained` names; None if it has none.

    Raises:
        UserError: the `data.json` of a run cannot be read.
    """
    run = run_of(Path(pretrained))
    if run is not None:
        return read_run_data(run).classes
    for name, key in ((SEGMENTER_FILE, "classes"), ("config.json", "id2label")):
        try:
            found = json.loads((Path(pretrained) / name).read_text()).get(key)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            found = [found[value] for value in sorted(found, key=int)]
        if isinstance(found, list) and not all(label == f"LABEL_{value}" for value, label in enumerate(found)):
            return tuple(map(str, found))
    return None


def known_bands(pretrained: str) -> tuple[Band, ...] | None:
    """Bands of the run or export that `model.pretrained` names, by input channel; empty: RGB; None: it is neither.

    Raises:
        UserError: the `data.json` of a run cannot be read.
    """
    run = run_of(Path(pretrained))
    if run is not None:
        return read_run_data(run).bands
    try:
        found = json.loads((Path(pretrained) / SEGMENTER_FILE).read_text()).get("bands", ())
        return tuple(Band(**band) for band in found)
    except (OSError, ValueError, TypeError):
        return None


def _grey(value: int, of: int) -> tuple[int, int, int]:
    level = 255 * value // max(1, of - 1)
    return level, level, level


def run_of(path: Path) -> Path | None:
    """The run directory of a path that names one or a checkpoint in one; None if it names neither.

    A checkpoint may be named from within its run: `step-00000100`, or `.`.
    """
    above = path.parent.parent if path.parent.name else path  # the folder of `x` is no run because the one it is in is
    folders = (path, above, path.resolve().parent.parent)
    return next((folder for folder in folders if RunFolder(folder).recipe.is_file()), None)


def recipe_of(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe that a run was trained with.

    Args:
        run: run directory.
        overrides: ``section.key=value``, see :func:`load_recipe`.

    Raises:
        CheckpointError: `run` is not a run directory.
        RecipeError: an override is wrong.
    """
    path = RunFolder(run).recipe
    if not path.is_file():
        raise CheckpointError(f"{run}: not a run directory (no {path.name}); name a folder that run.dir named")
    return load_recipe(path, overrides)
