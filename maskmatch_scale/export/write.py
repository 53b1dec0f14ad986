"""Writing a run's model as a folder that the backbone's own library loads, and this package too.

    OUT/
      segmenter.json            what `load_export` needs (export/description.py)
      README.md                 model card
    a segmenter that the library has, head and all, which is a SegFormer with its own head:
      config.json               of transformers, with the class names
      model.safetensors         in transformers' names
      preprocessor_config.json  of transformers' image processor
    every other segmenter:
      backbone/                 config.json and model.safetensors of timm or transformers
      head.safetensors          in this package's names

What depends on the library is in `export/kinds/`. Tensors are copied from a checkpoint's whole weights, which are
mapped into memory; DeepSpeed's files are not read. The context decoder, which only training uses, is not exported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from maskmatch_scale import __version__
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.engine.checkpoint import CheckpointError, find_checkpoint
from maskmatch_scale.errors import UserError
from maskmatch_scale.export.card import model_card
from maskmatch_scale.export.description import Description
from maskmatch_scale.export.kinds import Exported, kind_of
from maskmatch_scale.export.tensors import part_of, save_tensors
from maskmatch_scale.models import Segmenter
from maskmatch_scale.models.weights import SEGMENTER_FILE
from maskmatch_scale.recipe import Recipe, load_recipe
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.data import RunData, read_run_data
from maskmatch_scale.runs.model import build_student


def export_run(where: Path, out: Path, weights: str = "ema") -> str:
    """Export the newest checkpoint of a run, or a given one.

    Args:
        where: run directory, or a folder `checkpoints/step-XXXXXXXX` of one.
        out: folder to write; it must not exist, or be empty. It is written under another name beside its place, and
            renamed when it is whole.
        weights: `ema` or `student`.

    Returns:
        The Python call that loads it, to be shown to the user.

    Raises:
        UserError: no run, no checkpoint, data that are gone, weights that do not fit the recipe, or ``out`` is taken.
    """
    checkpoint = find_checkpoint(where).resolve()
    run = checkpoint.parent.parent
    if not RunFolder(run).recipe.is_file():
        raise CheckpointError(f"{where}: its run directory has no recipe.yaml; give a run, or a checkpoint within one")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: there is something already; name another folder, or remove it first")
    recipe = load_recipe(RunFolder(run).recipe)
    data = _data(run)
    with torch.device("meta"):  # shapes and configuration alone
        segmenter = build_student(recipe, data, pretrained=False)
    state = json.loads((checkpoint / "state.json").read_text())
    description = _describe(recipe, data, segmenter, weights, int(state["step"]))
    kind = kind_of(recipe.model.backbone)
    whole = kind.is_whole(description)

    target = out.resolve()
    writing = target.with_name(f".{target.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    with safe_open(checkpoint / f"{weights}.safetensors", framework="pt") as tensors:
        _check_fit(tensors, segmenter, checkpoint)
        exported = Exported(tensors, segmenter, recipe, description)
        if whole:
            kind.write_model(exported, writing)
        else:
            kind.write_backbone(exported, writing / "backbone")
            save_tensors(part_of(tensors, "head"), writing / "head.safetensors")
    (writing / SEGMENTER_FILE).write_text(description.model_dump_json(indent=1))
    card = model_card(target.name, run, recipe, data, description, segmenter, state)
    (writing / "README.md").write_text(card)
    writing.rename(target)
    return kind.whole_call(out) if whole else f'maskmatch_scale.export.load_export("{out}")'


def _data(run: Path) -> RunData:
    try:
        return read_run_data(run)
    except DataError as error:
        raise UserError(
            f"{run}: it has no data.json, and class names and palette lie with its data, which cannot be read; run "
            f"this where data.root of its recipe.yaml is found, or correct it there ({error})"
        ) from None


def _describe(recipe: Recipe, data: RunData, segmenter: Segmenter, weights: str, step: int) -> Description:
    kind = kind_of(recipe.model.backbone)
    return Description(
        backbone=kind.name(recipe.model.backbone),
        backbone_options=kind.options(recipe),
        head=recipe.model.head or segmenter.family.default_head,
        num_classes=segmenter.num_classes,
        image_size=recipe.data.crop_px,
        unit_px=segmenter.unit_px,
        classes=data.classes,
        palette=data.palette,
        ignore_index=data.ignore_index,
        mean=segmenter.mean,
        std=segmenter.std,
        weights=weights,
        step=step,
        versions={"maskmatch_scale": __version__, "torch": str(torch.__version__)} | kind.versions(),
    )


def _check_fit(tensors: Any, segmenter: Segmenter, checkpoint: Path) -> None:
    """Refuse weights that do not fit the recipe's model: recipe or data were changed after the training."""
    expected = _shapes(segmenter)
    found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{checkpoint}: {name} has shape {found.get(name)}, by recipe.yaml and data.json it is "
            f"{expected.get(name)}; put them back to what the run was trained with"
        )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
