"""How the backbones of a library are exported, with one file for each kind of export.

A backbone family names its kind (`Family.export_kind`). A new family that uses an existing kind needs no change here. A
new kind needs one file here and a line in `KINDS`.
"""

from __future__ import annotations

from maskmatch_scale.export.kinds.kind import Exported, ExportKind
from maskmatch_scale.export.kinds.timm_vit import TimmVit
from maskmatch_scale.export.kinds.transformers_segformer import TransformersSegformer
from maskmatch_scale.models.families import family_of

__all__ = ["KINDS", "ExportKind", "Exported", "kind_of"]

KINDS: dict[str, ExportKind] = {"timm_vit": TimmVit(), "transformers_segformer": TransformersSegformer()}


def kind_of(backbone: str) -> ExportKind:
    """The kind of export for a backbone.

    Args:
        backbone: its full name, as in `model.backbone`.

    Raises:
        ValueError: no family has such a backbone.
    """
    return KINDS[family_of(backbone).export_kind]
