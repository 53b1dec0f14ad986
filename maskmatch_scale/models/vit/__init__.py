"""The family of timm's Vision Transformers, `timm/<model name>`, in which masked tokens are dropped."""

from __future__ import annotations

from maskmatch_scale.models import weights
from maskmatch_scale.models.backbone import Backbone, Family, Wanted
from maskmatch_scale.models.vit.create import create_vit
from maskmatch_scale.models.vit.encoder import VitEncoder


class VitFamily(Family):
    """`VisionTransformer` and `Eva` models of timm, with its own or local weights."""

    prefix = "timm/"
    title = "ViT"
    accepted = ("timm/<model name>",)
    default_head = "linear"
    export_kind = "timm_vit"
    layer_title = "blocks"
    compiles_blocks = True
    numbers_layers = True
    captured_whole = True

    def build(self, wanted: Wanted) -> Backbone:
        """Let timm create the model, including its weights."""
        source = weights.find_weights(wanted.weights) if not isinstance(wanted.weights, bool) else wanted.weights
        model, notes = create_vit(wanted.name, wanted.image_size, source, wanted.options, wanted.in_channels)
        encoder = VitEncoder.build(model, wanted.unit_px, wanted.levels)
        return Backbone(encoder, tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"]), notes=notes)
