"""How the backbones of a library are exported: one file for each kind, named by the families that use it.

A backbone family says the name of its kind (`Family.export_kind`). So a new family with a kind that there is changes
nothing here, and a new kind is one file here and a line in `KINDS`.
"""

from __future__ import annotations

from maskmatch_scale.export.kinds.kind import Exported, ExportKind
from maskmatch_scale.export.kinds.timm_vit import TimmVit
from maskmatch_scale.export.kinds.transformers_segformer import TransformersSegformer
from maskmatch_scale.models.families import family_of

__all__ = ["KINDS", "ExportKind", "Exported", "kind_of"]

KINDS: dict[str, ExportKind] = {"timm_vit": TimmVit(), "transformers_segformer": TransformersSegformer()}


def kind_of(backbone: str) -> ExportKind:
    """How a backbone is exported, by its full name.

    Raises:
        ValueError: no family takes such a name.
    """
    return KINDS[family_of(backbone).export_kind]
