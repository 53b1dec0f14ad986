"""Writes the model of a run as a folder that the backbone's own library and this package can load.

    OUT/
      segmenter.json            what `load_export` needs (export/description.py)
      README.md                 model card
    if the library has the whole segmenter with its head (a SegFormer with its own head):
      config.json               of transformers, with the class names
      model.safetensors         with transformers' names of tensors
      preprocessor_config.json  of transformers' image processor
    for every other segmenter:
      backbone/                 config.json and model.safetensors of timm or transformers
      head.safetensors          with this package's names of tensors

What depends on the library is in `export/kinds/`. Tensors are read from a checkpoint one at a time. The context
decoder, which only training uses, is not exported.

Decision: docs/decisions/0028-exports-need-no-recipe.md.
"""

from __future__ import annotations

from pathlib import Path

import torch

from maskmatch_scale import __version__
from maskmatch_scale.checkpoints.finding import Checkpoint, opened
from maskmatch_scale.checkpoints.layout import CheckpointError
from maskmatch_scale.checkpoints.reading import load_weights
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.errors import UserError
from maskmatch_scale.export.card import model_card
from maskmatch_scale.export.description import Description
from maskmatch_scale.export.kinds import Exported, kind_of
from maskmatch_scale.export.tensors import part_of, save_tensors
from maskmatch_scale.files import folder_whole, write_whole
from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import Recipe, load_recipe
from maskmatch_scale.recipe.values import SEGMENTER_FILE
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.data import RunData, read_run_data
from maskmatch_scale.runs.model import build_student, check_shapes


def export_run(where: Path, out: Path, weights: str = "ema") -> str:
    """Export the newest checkpoint of a run, or a given one.

    Args:
        where: run directory, or a folder `checkpoints/step-XXXXXXXX` of one.
        out: folder to write; it must be empty or not exist. It is written under another name in the same folder, and
            renamed when it is complete.
        weights: `ema` or `student`.

    Returns:
        The Python call that loads the export, to show it to the user.

    Raises:
        UserError: there is no run or checkpoint, its class names cannot be read, its weights do not fit its recipe, or
            ``out`` is not empty.
        OSError: a file of the export cannot be written; nothing of it is left.
    """
    with opened(where) as checkpoint:
        return _export(where, checkpoint, out, weights)


def _export(where: Path, checkpoint: Checkpoint, out: Path, weights: str) -> str:
    run = checkpoint.folder.resolve().parent.parent
    if not RunFolder(run).recipe.is_file():
        raise CheckpointError(f"{where}: its run directory has no recipe.yaml; give a run, or a checkpoint within one")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: it exists and is not an empty folder; name another folder, or remove it first")
    recipe = load_recipe(RunFolder(run).recipe)
    data = _data(run)
    with torch.device("meta"):  # only shapes and configuration are needed
        segmenter = build_student(recipe, data, pretrained=False)
    description = _describe(recipe, data, segmenter, weights, checkpoint.step)
    kind = kind_of(recipe.model.backbone)
    whole = kind.is_whole(description)

    target = out.resolve()
    with folder_whole(target) as writing:
        tensors = load_weights(checkpoint.folder, weights)
        check_shapes(checkpoint.folder, tensors, segmenter)
        exported = Exported(tensors, segmenter, recipe, description)
        if whole:
            kind.write_model(exported, writing)
        else:
            kind.write_backbone(exported, writing / "backbone")
            save_tensors(part_of(tensors, "head"), writing / "head.safetensors")
        write_whole(writing / SEGMENTER_FILE, description.to_json())
        card = model_card(target.name, run, recipe, data, description, segmenter, checkpoint.state)
        write_whole(writing / "README.md", card)
    return kind.whole_call(out) if whole else f'maskmatch_scale.export.load_export("{out}")'


def _data(run: Path) -> RunData:
    try:
        return read_run_data(run)
    except DataError as error:
        raise UserError(
            f"{run}: it has no data.json, and its data, which have the class names and palette, cannot be read; run "
            f"this where data.root of its recipe.yaml exists, or correct data.root there ({error})"
        ) from None


def _describe(recipe: Recipe, data: RunData, segmenter: Segmenter, weights: str, step: int) -> Description:
    kind = kind_of(recipe.model.backbone)
    return Description(
        backbone=kind.name(recipe.model.backbone),
        backbone_options=kind.options(recipe),
        head=recipe.model.head or segmenter.family.default_head,
        num_classes=segmenter.num_classes,
        image_size=recipe.data.crop_px,
        position_px=segmenter.encoder.position_px,
        unit_px=segmenter.unit_px,
        classes=data.classes,
        palette=data.palette,
        ignore_index=data.ignore_index,
        bands=data.bands,
        mean=segmenter.mean,
        std=segmenter.std,
        evaluation=recipe.evaluation,
        exif_orientation=recipe.data.exif_orientation,
        weights=weights,
        step=step,
        versions={"maskmatch_scale": __version__, "torch": str(torch.__version__)} | kind.versions(),
    )
