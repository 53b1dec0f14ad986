"""The family of transformers' SegFormers, in which masked units are dropped exactly.

`transformers/segformer-b0` … `-b5` are the official sizes; `transformers/<folder>` has a `config.json` of its own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from maskmatch_scale.models.backbone import Backbone, Family, Wanted
from maskmatch_scale.models.segformer.config import segformer_config
from maskmatch_scale.models.segformer.encoder import SegformerEncoder
from maskmatch_scale.models.segformer.weights import segformer_weights


class SegformerFamily(Family):
    """SegFormers of transformers, with the library's own or local weights."""

    prefix = "transformers/"
    title = "SegFormer"
    accepted = ("transformers/segformer-b0 … -b5", "transformers/<folder with a config.json>")
    default_head = "segformer"
    export_kind = "transformers_segformer"
    layer_title = "stages"
    compiles_blocks = True

    def build(self, wanted: Wanted) -> Backbone:
        """Build the encoder from its configuration. Weights may include a head, so they are read once that is built."""
        config = segformer_config(wanted.name, wanted.num_classes, wanted.options, wanted.in_channels)
        encoder = SegformerEncoder.build(config)
        if wanted.unit_px is not None and wanted.unit_px != encoder.unit_px:
            raise ValueError(
                f"unit_px: {wanted.unit_px} does not fit; a unit of {self.prefix}{wanted.name} is "
                f"{encoder.unit_px} px, its stride × sr_ratio"
            )
        source: str | Path | None = wanted.weights if isinstance(wanted.weights, Path) else None
        if wanted.weights is True:
            source = wanted.name
        return Backbone(
            encoder,
            IMAGENET_DEFAULT_MEAN,
            IMAGENET_DEFAULT_STD,
            config.decoder_hidden_size,
            config.classifier_dropout_prob,
            read_weights=None if source is None else partial(segformer_weights, source, config),
        )
