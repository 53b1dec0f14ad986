"""Building a segmenter: a family's backbone, a head, a context decoder, and the weights they start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskmatch_scale.models import weights
from maskmatch_scale.models.backbone import Wanted
from maskmatch_scale.models.channels import OPTIONS, channel_names, statistics_of
from maskmatch_scale.models.context import ContextDecoder
from maskmatch_scale.models.deferred import StoredWeights
from maskmatch_scale.models.families import family_of
from maskmatch_scale.models.heads import build_head, head_levels
from maskmatch_scale.models.segmenter import Segmenter


def build_segmenter(
    backbone: str,
    num_classes: int,
    *,
    head: str | None = None,
    pretrained: bool | str | Path | StoredWeights | None = None,
    image_size: int | tuple[int, int] | None = None,
    unit_px: int | None = None,
    context: bool = True,
    checkpoint_activations: bool = False,
    backbone_options: dict[str, Any] | None = None,
    in_channels: int | Sequence[str] = 3,
) -> Segmenter:
    """Build a segmenter; the same weights for the same `torch.manual_seed` before the call.

    Args:
        backbone: `timm/<model name>` (VisionTransformer and Eva models), `transformers/segformer-b0` … `-b5`, or
            `transformers/<folder>` with a SegFormer `config.json`.
        num_classes: number of classes, at least 2.
        head: `segformer` (transformers' all-MLP head), `linear`, `pixel_shuffle` (classes × r² values a cell: logits
            for each pixel), or `dpt` (convolutional fusion of four levels; for a ViT, features of four depths, and
            logits at a quarter of the patch); None: `segformer` for SegFormer, `linear` for a ViT.
        pretrained: None or False (random), True (the library's own weights; for a folder, those in it), or a local
            file or folder: safetensors, .pth (tensors only), a folder of transformers, or an export of this package; or
            a segmenter's weights in its own names, read one at a time.
        image_size: side or (height, width) in pixels for which a ViT's position embedding is laid out; None: the
            model's own, as training does. Images of other sizes work too: it is resized at every call (docs/decisions/
            0050-position-embeddings-keep-their-grid.md). SegFormer has no position embedding.
        unit_px: side of a maskable unit in pixels. ViT: a multiple of the patch, by default the largest that is at most
            32. SegFormer: fixed by its strides, 32 for b0–b5.
        context: whether to build the context decoder that masked passes in training predict masked positions with.
        checkpoint_activations: whether backward runs the backbone's blocks again, so that what lies between their
            inputs and outputs is not kept: the same gradients for less memory and one more forward pass.
        backbone_options: further keyword arguments of `timm.create_model` (`patch_size`, `embed_dim`, `depth`,
            `drop_path_rate` …), or keys of `SegformerConfig`.
        in_channels: number of channels of images, or their names. Those named red, green and blue are normalised as the
            weights expect of these colours, the others by the mean of the three. Three channels without names are RGB.
            Weights for another number of channels are adapted by timm's rule, which `Segmenter.start_notes` says.

    Raises:
        ValueError: an argument that is unknown or does not fit; names it, its value and what would fit.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: {num_classes}; at least 2 are needed")
    names = channel_names(in_channels)
    for key in OPTIONS:
        if key in (backbone_options or {}):
            raise ValueError(f"model.backbone_options.{key}: the data decide the channels (data.channels); remove it")
    source: Path | bool = isinstance(pretrained, bool) and pretrained
    own = None
    if isinstance(pretrained, str | Path):
        source = Path(pretrained)
        own = weights.read_own(source)
    elif pretrained is not None and not isinstance(pretrained, bool):
        own = weights.read_own(pretrained)
    family = family_of(backbone)
    head_name = head or family.default_head
    built = family.build(
        Wanted(
            backbone.removeprefix(family.prefix),
            num_classes,
            head_levels(head_name),
            image_size,
            unit_px,
            source if own is None else False,
            dict(backbone_options or {}),
            len(names),
        )
    )
    encoder = built.encoder
    if checkpoint_activations:
        encoder.checkpoint_blocks()
    # The order of what follows is the order in which random weights are drawn.
    built_head = build_head(head_name, encoder.channels, encoder.strides, num_classes, built.hidden_size, built.dropout)
    cells = [encoder.unit_px // stride for stride in encoder.strides]
    decoder = ContextDecoder(encoder.channels, cells) if context else None
    mean, std = (statistics_of(names, of_colours) for of_colours in (built.mean, built.std))
    segmenter = Segmenter(family, encoder, built_head, decoder, num_classes, mean, std, names)
    state = own if own is not None or built.read_weights is None else built.read_weights()
    if state is not None:
        segmenter.start_notes = tuple(weights.load_own(segmenter, state, pretrained, num_classes, len(names)))
    elif source is not False:
        segmenter.start_notes = (*built.notes, "new, at random: the head")
    return segmenter
