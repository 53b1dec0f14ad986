"""Loads a segmenter from a folder that `maskmatch export` wrote, without run, recipe, data or network.

Decision: docs/decisions/0028-exports-need-no-recipe.md.
"""

from __future__ import annotations

from pathlib import Path

from maskmatch_scale.errors import UserError
from maskmatch_scale.export.description import read_description
from maskmatch_scale.export.kinds import kind_of
from maskmatch_scale.export.segmenter import ExportedSegmenter
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.weights import read_export


def load_export(folder: str | Path) -> ExportedSegmenter:
    """Build an exported segmenter, without context decoder, and load its weights.

    Args:
        folder: a folder that `maskmatch export` wrote.

    Returns:
        The segmenter in eval mode, float32, on the CPU. Its logits equal those of the run's segmenter. Its method
        `predict` takes images of any size.

    Raises:
        UserError: the folder is not an export, or its tensors do not fit its `segmenter.json`.
    """
    folder = Path(folder).resolve()  # absolute, so that a folder is not mistaken for a published size of the same name
    description = read_description(folder)
    try:
        segmenter = build_segmenter(
            kind_of(description.backbone).backbone_in(folder, description),
            description.num_classes,
            head=description.head,
            image_size=description.position_px or description.image_size,
            unit_px=description.unit_px,
            context=False,
            backbone_options=description.backbone_options,
            in_channels=description.channels,
        )
        segmenter.load_state_dict(read_export(folder))
    except (ValueError, RuntimeError) as error:  # RuntimeError: tensors of other names or shapes
        raise UserError(f"{folder}: not a complete export: {error}") from error
    return ExportedSegmenter(segmenter, description).eval()
