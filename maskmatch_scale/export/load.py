"""A segmenter from a folder that `maskmatch export` wrote: no run, no recipe, no data and no network needed."""

from __future__ import annotations

from pathlib import Path

from maskmatch_scale.errors import UserError
from maskmatch_scale.export.description import read_description
from maskmatch_scale.export.kinds import kind_of
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.weights import read_export


def load_export(folder: str | Path) -> Segmenter:
    """Build an exported segmenter, without context decoder, and load its weights.

    Args:
        folder: what `maskmatch export` wrote.

    Returns:
        The segmenter in eval mode, float32, on the CPU: logits equal those of the run's own.

    Raises:
        UserError: the folder is no export, or its tensors do not fit its description.
    """
    folder = Path(folder).resolve()  # absolute, so that no folder is taken for an official size of the same name
    description = read_description(folder)
    try:
        segmenter = build_segmenter(
            kind_of(description.backbone).backbone_in(folder, description),
            description.num_classes,
            head=description.head,
            image_size=description.image_size,
            unit_px=description.unit_px,
            context=False,
            backbone_options=description.backbone_options,
        )
        segmenter.load_state_dict(read_export(folder))
    except (ValueError, RuntimeError) as error:  # RuntimeError: tensors of other names or shapes
        raise UserError(f"{folder}: not a whole export: {error}") from error
    segmenter.mean, segmenter.std = description.mean, description.std
    return segmenter.eval()
