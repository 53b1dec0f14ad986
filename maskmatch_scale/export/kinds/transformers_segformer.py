"""SegFormers of transformers: a whole model of the library if the head is SegFormer's own, else the encoder alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import transformers

from maskmatch_scale.export.description import Description
from maskmatch_scale.export.kinds.kind import Exported, ExportKind
from maskmatch_scale.export.markdown import string
from maskmatch_scale.export.tensors import part_of, renamed, save_tensors
from maskmatch_scale.models.weights import to_transformers_name
from maskmatch_scale.recipe import Recipe


class TransformersSegformer(ExportKind):
    """Writes `config.json` and `model.safetensors` as transformers does, into the export's folder or `backbone/`."""

    library = "transformers"

    def name(self, backbone: str) -> str:
        """The name. If it is a folder, without the path, which belongs to this machine."""
        library, _, name = backbone.partition("/")
        return f"{library}/{Path(name).name}"

    def options(self, recipe: Recipe) -> dict[str, Any]:
        """No options: they are in the `config.json` that is written."""
        return {}

    def versions(self) -> dict[str, str]:
        """The version of transformers."""
        return {"transformers": transformers.__version__}

    def is_whole(self, description: Description) -> bool:
        """Whether the head is SegFormer's own."""
        return description.head == "segformer"

    def write_model(self, exported: Exported, folder: Path) -> None:
        """Write a `SegformerForSemanticSegmentation` and, for RGB, its image processor, which is for RGB alone."""
        description = exported.description
        _config(exported, "SegformerForSemanticSegmentation").save_pretrained(folder)
        state = renamed(exported.tensors, ("backbone.", "head."), to_transformers_name)
        save_tensors(state, folder / "model.safetensors")
        if description.bands:
            return
        height, width = description.image_size
        # Images keep their own size, as in the run's evaluation.
        processor = transformers.SegformerImageProcessor(
            do_resize=False,
            size={"height": height, "width": width},
            image_mean=list(description.mean),
            image_std=list(description.std),
        )
        processor.save_pretrained(folder)

    def whole_call(self, folder: Path) -> str:
        """A call of transformers alone."""
        return f'transformers.SegformerForSemanticSegmentation.from_pretrained("{folder}")'

    def write_backbone(self, exported: Exported, folder: Path) -> None:
        """Write a `SegformerModel`."""
        _config(exported, "SegformerModel").save_pretrained(folder)
        save_tensors(part_of(exported.tensors, "backbone"), folder / "model.safetensors")

    def backbone_in(self, folder: Path, description: Description) -> str:
        """The folder with the `config.json`."""
        return f"transformers/{folder if (folder / 'config.json').is_file() else folder / 'backbone'}"

    def card_section(self, name: str, description: Description) -> str:
        """How to load the whole model, or its encoder."""
        if self.is_whole(description) and description.bands:
            return f"""With transformers, whose image processor is for RGB alone:

```python
from transformers import SegformerForSemanticSegmentation

model = SegformerForSemanticSegmentation.from_pretrained({string(name)})
logits = model(images).logits  # images: float (B, {len(description.bands)}, H, W), normalised as above
```"""
        if self.is_whole(description):
            return f"""With transformers:

```python
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

model = SegformerForSemanticSegmentation.from_pretrained({string(name)})
processor = SegformerImageProcessor.from_pretrained({string(name)})  # normalises, does not resize
# image: PIL, RGB
outputs = model(**processor(image, return_tensors="pt"))
labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]
```"""
        return f"""The backbone alone with transformers:

```python
from transformers import SegformerModel

backbone = SegformerModel.from_pretrained({string(f"{name}/backbone")})
features = backbone(images, output_hidden_states=True).hidden_states  # four maps (B, C, h, w)
```"""


def _config(exported: Exported, architecture: str) -> Any:
    """The model's configuration with class names."""
    description = exported.description
    config: Any = copy.deepcopy(exported.segmenter.backbone.config)
    named = dict(enumerate(description.classes))
    config.id2label = {value: named.get(value, f"unnamed {value}") for value in range(description.num_classes)}
    config.label2id = {name: value for value, name in config.id2label.items()}
    config.semantic_loss_ignore_index = description.ignore_index
    config.architectures, config.dtype = [architecture], "float32"
    return config
