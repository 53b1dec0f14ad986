"""Writing a run's model as a folder that the backbone's own library loads, and ours.

    OUT/
      segmenter.json            what our loader needs (export/load.py)
      README.md                 model card
    a SegFormer with its own head:
      config.json               of transformers, with the class names
      model.safetensors         in transformers' names
      preprocessor_config.json  of transformers' image processor
    every other segmenter:
      backbone/                 config.json and model.safetensors of timm or transformers
      head.safetensors          in this package's names

Tensors are copied from a checkpoint's whole weights, which are mapped and not read; DeepSpeed's files are not touched.
The context decoder, which training alone uses, stays behind.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.eva import Eva
from torch import Tensor, nn

from maskmatch_scale import __version__
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.engine.checkpoint import CheckpointError, find_checkpoint
from maskmatch_scale.errors import UserError
from maskmatch_scale.export.card import model_card
from maskmatch_scale.export.load import Description
from maskmatch_scale.models import Segmenter
from maskmatch_scale.models.weights import SEGMENTER_FILE, to_transformers_name
from maskmatch_scale.recipe import Recipe, load_recipe
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.data import RunData, read_run_data
from maskmatch_scale.runs.model import build_student

# What timm tells of the weights published under a model's name; it would be untrue of these.
_OF_PUBLISHED_WEIGHTS = ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes", "description")


def export_run(where: Path, out: Path, weights: str = "ema") -> str:
    """Export the newest checkpoint of a run, or a given one.

    Args:
        where: run directory, or a folder `checkpoints/step-XXXXXXXX` of one.
        out: folder to write; it must not exist, or be empty. It is written beside and renamed when it is whole.
        weights: `ema` or `student`.

    Returns:
        The call that loads it, for the user.

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

    target = out.resolve()
    writing = target.with_name(f".{target.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    with safe_open(checkpoint / f"{weights}.safetensors", framework="pt") as tensors:
        _check_fit(tensors, segmenter, checkpoint)
        if description.in_transformers:
            _write_segformer(tensors, segmenter, description, writing)
        else:
            _write_parts(tensors, segmenter, recipe, description, writing)
    (writing / SEGMENTER_FILE).write_text(description.model_dump_json(indent=1))
    card = model_card(target.name, run, recipe, data, description, segmenter, state)
    (writing / "README.md").write_text(card)
    writing.rename(target)
    if description.in_transformers:
        return f'transformers.SegformerForSemanticSegmentation.from_pretrained("{out}")'
    return f'maskmatch_scale.export.load_export("{out}")'


def _data(run: Path) -> RunData:
    try:
        return read_run_data(run)
    except DataError as error:
        raise UserError(
            f"{run}: it has no data.json, and class names and palette lie with its data, which cannot be read; run "
            f"this where data.root of its recipe.yaml is found, or correct it there ({error})"
        ) from None


def _describe(recipe: Recipe, data: RunData, segmenter: Segmenter, weights: str, step: int) -> Description:
    library, _, name = recipe.model.backbone.partition("/")
    ours = {"maskmatch_scale": __version__, "torch": str(torch.__version__)}
    if library == "timm":
        head, options, versions = "linear", recipe.model.backbone_options, {"timm": timm.__version__}
    else:
        # A folder's path is of this machine.
        name = Path(name).name
        head, options, versions = "segformer", {}, {"transformers": transformers.__version__}
    return Description(
        backbone=f"{library}/{name}",
        backbone_options=options,
        head=recipe.model.head or head,
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
        versions=ours | versions,
    )


def _check_fit(tensors: Any, segmenter: Segmenter, checkpoint: Path) -> None:
    """Refuse weights that the recipe's model does not have: it was changed since."""
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


def _write_segformer(tensors: Any, segmenter: Segmenter, description: Description, folder: Path) -> None:
    config = _segformer_config(segmenter, description, "SegformerForSemanticSegmentation")
    config.save_pretrained(folder)
    _save(_renamed(tensors, ("backbone.", "head."), to_transformers_name), folder / "model.safetensors")
    height, width = description.image_size
    # Images are taken as large as they are: the run's own evaluation scales nothing.
    processor = transformers.SegformerImageProcessor(
        do_resize=False,
        size={"height": height, "width": width},
        image_mean=list(description.mean),
        image_std=list(description.std),
    )
    processor.save_pretrained(folder)


def _write_parts(tensors: Any, segmenter: Segmenter, recipe: Recipe, description: Description, folder: Path) -> None:
    backbone = _renamed(tensors, ("backbone.",), lambda name: name.removeprefix("backbone."))
    if description.backbone.startswith("timm/"):
        _write_timm(backbone, segmenter, recipe, folder / "backbone")
    else:
        _segformer_config(segmenter, description, "SegformerModel").save_pretrained(folder / "backbone")
        _save(backbone, folder / "backbone" / "model.safetensors")
    _save(_renamed(tensors, ("head.",), lambda name: name.removeprefix("head.")), folder / "head.safetensors")


def _segformer_config(segmenter: Segmenter, description: Description, architecture: str) -> Any:
    config: Any = copy.deepcopy(segmenter.backbone.config)
    named = dict(enumerate(description.classes))
    config.id2label = {value: named.get(value, f"unnamed {value}") for value in range(description.num_classes)}
    config.label2id = {name: value for value, name in config.id2label.items()}
    config.semantic_loss_ignore_index = description.ignore_index
    config.architectures, config.dtype = [architecture], "float32"
    return config


def _write_timm(state: dict[str, Tensor], segmenter: Segmenter, recipe: Recipe, folder: Path) -> None:
    """Have timm write a backbone, with the arguments by which `timm.create_model` gives the same tokens when called.

    Raises:
        UserError: timm builds other tensors by them.
    """
    backbone: Any = segmenter.backbone
    # Pooling decides where timm puts the last norm; without pooling it has to be said.
    norm_key = "use_fc_norm" if isinstance(backbone, Eva) else "fc_norm"
    arguments = {
        "dynamic_img_size": True,
        "num_classes": 0,
        **recipe.model.backbone_options,
        "img_size": list(recipe.data.crop_px),
        "global_pool": "",
        norm_key: not isinstance(backbone.fc_norm, nn.Identity),
    }
    with torch.device("meta"):
        model = timm.create_model(recipe.model.backbone.removeprefix("timm/"), **arguments)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"model.backbone={recipe.model.backbone}: timm builds another model: {error}") from error
    for key in _OF_PUBLISHED_WEIGHTS:
        model.pretrained_cfg.pop(key, None)
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)


def _renamed(tensors: Any, prefixes: tuple[str, ...], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors whose names begin so; they are mapped from the checkpoint, and read when they are written."""
    names = [name for name in tensors.keys() if name.startswith(prefixes)]  # noqa: SIM118 - no mapping
    return {rename(name): tensors.get_tensor(name) for name in names}


def _save(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path, metadata={"format": "pt"})  # transformers asks for the format
