"""Whether a run can continue a checkpoint: the same model; and what else has changed, which it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from maskmatch_scale.checkpoints.finding import Checkpoint
from maskmatch_scale.checkpoints.layout import CheckpointError
from maskmatch_scale.recipe import Recipe

_PLAIN = {"channels": "red, green, blue"}
"""Of facts that are left out where they are the usual ones."""


def run_facts(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """What `state.json` says of a run besides its model; all of it may be another when the run continues."""
    engine = recipe.engine
    return {
        "world_size": world_size,
        "library": engine.library,
        "zero_stage": engine.zero_stage,
        "precision": engine.precision,
        "global_batch": engine.micro_batch * engine.accumulation * world_size,
    }


def model_facts(
    recipe: Recipe, head: str, num_classes: int, classes: tuple[str, ...], bands: Sequence[str] = ()
) -> dict[str, Any]:
    """What `state.json` says of the model; all of it must be the same when the run continues.

    Args:
        recipe: of the run.
        head: name of the head that was built.
        num_classes: of the model.
        classes: names of classes, of the data.
        bands: by input channel, in words; empty: red, green and blue, of which nothing is said.
    """
    library, _, name = recipe.model.backbone.partition("/")
    return {
        "backbone": f"{library}/{PurePath(name).name}",  # a folder may lie elsewhere by now
        "head": head,
        "number of classes": num_classes,
        "classes": list(classes),
    } | ({"channels": list(bands)} if bands else {})


def check_fit(checkpoint: Checkpoint, model: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint of another model.

    Args:
        checkpoint: to continue from.
        model: this run's :func:`model_facts`.
        shapes: of this run's student, by the names of its `state_dict`.

    Raises:
        CheckpointError: one line that names the first thing that differs.
    """
    folder, wrote = checkpoint.folder, checkpoint.state.get("model", {})
    remedy = "continue with the recipe that it was trained with, or start a new run from its weights (model.pretrained)"
    for what in (*model, *(key for key in wrote if key not in model)):
        now = model.get(what, _PLAIN.get(what))
        if wrote.get(what, _PLAIN.get(what)) != now:
            before, after = _shown(wrote.get(what, _PLAIN.get(what))), _shown(now)
            if "classes" in what:
                remedy = f"compare data.remap, or the classes of data.root; {remedy}"
            raise CheckpointError(f"{folder}: it has another model: {what} {before}, this run has {after}; {remedy}")
    prefix = "student/"
    stored = {
        name.removeprefix(prefix): entry.shape
        for name, entry in checkpoint.index.tensors.items()
        if name.startswith(prefix)
    }
    wrong = sorted(name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name))
    if wrong:
        name, more = wrong[0], f" (and {len(wrong) - 1} more tensors differ)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{folder}: it has another model: {name} {_shape(stored.get(name))}, in this run {_shape(shapes.get(name))}"
            f"{more}; compare model.backbone_options (img_size gives a position embedding its shape), model.unit_px, "
            f"method.mask and method.strong_view.keep; {remedy}"
        )


def changes(state: Mapping[str, Any], recipe: Recipe, world_size: int) -> list[str]:
    """Lines on what differs from the run that wrote a checkpoint, for people; none if nothing does.

    Args:
        state: `state.json` of the checkpoint; empty for a new run.
        recipe: of this run.
        world_size: number of its ranks.
    """
    now = run_facts(recipe, world_size)
    differing = [name for name in now if name in state and state[name] != now[name]]
    lines = []
    how = [name for name in differing if name != "global_batch"]
    if how:
        lines.append(
            f"continued from step {state['step']} with "
            + ", ".join(f"{name}={now[name]} (was {state[name]})" for name in how)
        )
    if "global_batch" in differing:
        lines.append(
            f"a step takes {now['global_batch']} labelled images instead of {state['global_batch']}: each sample of "
            "the epoch that was not taken yet is still taken once, in another order; learning rate and run.steps are "
            "the recipe's"
        )
    return lines


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _shape(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"has shape {tuple(shape)}"
