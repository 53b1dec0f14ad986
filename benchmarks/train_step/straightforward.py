"""The straightforward model: the library's own as it ships, with a linear head on a ViT's tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import timm
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SegformerForSemanticSegmentation

from maskmatch_scale.models import Segmenter
from maskmatch_scale.models.weights import to_transformers_name


class Straightforward(nn.Module):
    """The library's model with a copy of a segmenter's weights.

    Args:
        segmenter: whose weights are copied.
        name: full name of its backbone.
        size: side of the images, px.
    """

    def __init__(self, segmenter: Segmenter, name: str, size: int) -> None:
        super().__init__()
        state = {k: v for k, v in segmenter.state_dict().items() if not k.startswith("context.")}
        library, _, model = name.partition("/")
        self.is_segformer = library == "transformers"
        if self.is_segformer:
            config = copy.deepcopy(segmenter.backbone.config)
            config.num_labels = segmenter.num_classes
            self.model = SegformerForSemanticSegmentation(config)
            self.model.load_state_dict({to_transformers_name(key): value for key, value in state.items()})
        else:
            self.model = timm.create_model(model, num_classes=0, img_size=size, dynamic_img_size=True)
            backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
            self.model.load_state_dict(backbone)
            self.head = nn.Conv2d(self.model.embed_dim, segmenter.num_classes, 1)
            self.head.weight.data = state["head.classifiers.0.weight"][..., None, None].clone()
            self.head.bias.data = state["head.classifiers.0.bias"].clone()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes, h, w) at the model's own resolution, from images (B, 3, H, W)."""
        if self.is_segformer:
            return self.model(images).logits
        patch = self.model.patch_embed.patch_size[0]
        tokens = self.model.forward_features(images)[:, self.model.num_prefix_tokens :]
        maps = tokens.transpose(1, 2).unflatten(2, (images.shape[2] // patch, images.shape[3] // patch))
        return self.head(maps)


def up(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Upsample logits (B, classes, h, w) bilinearly to a size (H, W)."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
