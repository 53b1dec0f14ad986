"""A run's model: built from its recipe, loaded from its checkpoint, evaluated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import load_index
from maskmatch_scale.engine.checkpoint import CheckpointError, find_checkpoint, load_weights
from maskmatch_scale.errors import UserError
from maskmatch_scale.evaluation.evaluate import Window, evaluate_split
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.evaluation.save_pictures import save_masked_pictures, save_pictures
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.weights import SEGMENTER_FILE, read_own
from maskmatch_scale.recipe import Recipe, load_recipe


class RunData(BaseModel):
    """The contents of `RUN/data.json`: what a run's model has to do with its data, for when these are elsewhere."""

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
        named |= _classes_of_start(recipe)
    samples = {name: stream.samples for name, stream in index.streams.items()} | dict(used or {})
    return RunData(**named, samples=samples)


def _classes_of_start(recipe: Recipe) -> dict[str, Any]:
    """Classes of the run or export that `model.pretrained` names; unnamed ones if only `model.num_classes` is known."""
    start = recipe.model.pretrained
    wanted = {"classes", "palette", "ignore_index"}
    if isinstance(start, str):
        run = _run_of(Path(start))
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


def _run_of(path: Path) -> Path | None:
    """The run directory that a path names, or that the checkpoint it names lies in."""
    return next((folder for folder in (path, path.parent.parent) if (folder / "recipe.yaml").is_file()), None)


def read_run_data(run: Path) -> RunData:
    """Read `RUN/data.json`; of a run that has none, what the index of its data says.

    Raises:
        UserError: neither can be read.
    """
    path = run / "data.json"
    if not path.is_file():
        recipe = _recipe_of(run)
        return describe_data(recipe, load_index(recipe.data.root, recipe.data))
    try:
        return RunData.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: {error.errors()[0]['msg']}; it cannot be read") from None


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
    if isinstance(pretrained, str) and _run_of(Path(pretrained)) is not None:
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
    known = _classes_of_start(recipe)["classes"]
    if recipe.model.num_classes is None and list(known) != list(classes):
        raise UserError(
            f"{given}: it was trained on classes {', '.join(known)}, the index of {recipe.data.root} has "
            f"{', '.join(classes)}; they must be the same, in the same order"
        )


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
    segmenter = build_student(recipe, read_run_data(run), pretrained=False)
    segmenter.load_state_dict(load_weights(folder, weights))
    step = json.loads((folder / "state.json").read_text())["step"]
    return recipe, segmenter.eval(), int(step)


def held_out_images(run: Path, split: str) -> int:
    """How many images a run's data hold in ``split``.

    Raises:
        ValueError: no run, or no such stream.
    """
    data = _recipe_of(run).data
    return load_index(data.root, data).stream(split).samples


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
        index = load_index(recipe.data.root, recipe.data)
        models[kind] = segmenter.to(device)
        matrix = ConfusionMatrix(segmenter.num_classes, index.ignore_index)
        window = window_of(recipe, segmenter, device)
        images = evaluate_split(segmenter, recipe.data, split, window, matrix, progress=progress)
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
        run / "pictures" / split, recipe.data, split, recipe.evaluation.pictures, dict(models), window
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
