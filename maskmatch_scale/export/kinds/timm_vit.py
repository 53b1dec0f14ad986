"""ViTs of timm: timm writes the backbone, with the arguments that build it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from timm.models.eva import Eva
from torch import nn

from maskmatch_scale.errors import UserError
from maskmatch_scale.export.description import Description
from maskmatch_scale.export.kinds.kind import Exported, ExportKind
from maskmatch_scale.export.markdown import string
from maskmatch_scale.export.tensors import part_of
from maskmatch_scale.recipe import Recipe

# Facts about the weights that timm publishes under a model's name. They are not true of the exported weights.
_OF_PUBLISHED_WEIGHTS = ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes", "description")


class TimmVit(ExportKind):
    """Writes `backbone/` with timm's own `config.json` and `model.safetensors`. timm has none of our heads."""

    library = "timm"

    def name(self, backbone: str) -> str:
        """The name, unchanged."""
        return backbone

    def options(self, recipe: Recipe) -> dict[str, Any]:
        """The options of the recipe."""
        return recipe.model.backbone_options

    def versions(self) -> dict[str, str]:
        """The version of timm."""
        return {"timm": timm.__version__}

    def write_backbone(self, exported: Exported, folder: Path) -> None:
        """Have timm write it, with the arguments by which `timm.create_model` gives the same tokens when called.

        Raises:
            UserError: timm builds a model with other tensors from these arguments.
        """
        recipe, backbone = exported.recipe, exported.segmenter.backbone
        # timm lays the last norm before or behind the pooling, by the kind of pooling. Without pooling it must be told.
        norm_key = "use_fc_norm" if isinstance(backbone, Eva) else "fc_norm"
        position_px = exported.description.position_px
        arguments = {
            "dynamic_img_size": True,
            "num_classes": 0,
            **({} if exported.segmenter.in_channels == 3 else {"in_chans": exported.segmenter.in_channels}),
            **recipe.model.backbone_options,
            **({} if position_px is None else {"img_size": list(position_px)}),
            "global_pool": "",
            norm_key: not isinstance(backbone.fc_norm, nn.Identity),
        }
        with torch.device("meta"):
            model = timm.create_model(_timm_name(recipe.model.backbone), **arguments)
        try:
            model.load_state_dict(part_of(exported.tensors, "backbone"), assign=True)
        except RuntimeError as error:
            raise UserError(f"model.backbone={recipe.model.backbone}: timm builds another model: {error}") from error
        for key in _OF_PUBLISHED_WEIGHTS:
            model.pretrained_cfg.pop(key, None)
        if exported.description.bands:
            published = model.pretrained_cfg.get("input_size") or (3, *exported.description.image_size)
            # By this timm knows that the patch embedding is for these channels; and who loads it, how to normalise.
            model.pretrained_cfg["input_size"] = (exported.segmenter.in_channels, *published[1:])
            model.pretrained_cfg["mean"] = exported.description.mean
            model.pretrained_cfg["std"] = exported.description.std
        save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
        # safetensors lets the owner alone read what it writes.
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)

    def backbone_in(self, folder: Path, description: Description) -> str:
        """The name, unchanged: timm builds it, and the options are in the description."""
        return description.backbone

    def card_section(self, name: str, description: Description) -> str:
        """Two ways of loading the backbone."""
        return f"""The backbone alone with timm:

```python
import timm

backbone = timm.create_model({string(f"local-dir:{name}/backbone")}, pretrained=True)
tokens = backbone(images)  # (B, prefix + h · w, C), normalised
```

or by the arguments in `backbone/config.json`, and a head of your own:

```python
import json, timm

arguments = json.load(open({string(f"{name}/backbone/config.json")}))["model_args"]
path = {string(f"{name}/backbone/model.safetensors")}
backbone = timm.create_model({string(_timm_name(description.backbone))}, checkpoint_path=path, **arguments)
```"""


def _timm_name(backbone: str) -> str:
    return backbone.partition("/")[2]
