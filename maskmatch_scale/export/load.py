"""A segmenter from a folder that `maskmatch export` wrote: no run, no recipe, no data and no network needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from maskmatch_scale.errors import UserError
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.weights import SEGMENTER_FILE, read_export


class Description(BaseModel):
    """The contents of `segmenter.json`: what a segmenter is, apart from its tensors."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    backbone: str
    """As in the recipe. A SegFormer's configuration lies in the export: of a folder only the name is kept here."""
    backbone_options: dict[str, Any]
    """Keyword arguments of timm.create_model; empty for a SegFormer, whose configuration has them."""
    head: str
    num_classes: int
    image_size: tuple[int, int]
    """Height and width of the crops it was trained on, px; a ViT's position embedding is laid out for it."""
    unit_px: int
    classes: tuple[str, ...]
    """Class v of the logits is ``classes[v]``; there may be fewer names than logits."""
    palette: tuple[tuple[int, int, int], ...]
    """One RGB colour a name, 0–255."""
    ignore_index: int
    """Label value of pixels that counted for nothing."""
    mean: tuple[float, float, float]
    """Of RGB in 0–1, to be subtracted from images."""
    std: tuple[float, float, float]
    """Of RGB in 0–1, to divide images by afterwards."""
    weights: str
    """`ema` or `student`."""
    step: int
    """Optimizer steps taken."""
    versions: dict[str, str]
    """Of the packages it was written with."""

    @property
    def in_transformers(self) -> bool:
        """Whether transformers has this segmenter, head and all."""
        return self.backbone.startswith("transformers/") and self.head == "segformer"


def read_description(folder: Path) -> Description:
    """Read `segmenter.json`.

    Raises:
        UserError: there is none, or it does not parse.
    """
    path = folder / SEGMENTER_FILE
    if not path.is_file():
        raise UserError(f"{folder}: not an export (no {SEGMENTER_FILE}); write one with `maskmatch export RUN OUT`")
    try:
        return Description.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']}; export the run again") from None


def load_export(folder: str | Path) -> Segmenter:
    """Build an exported segmenter, without context decoder, and load its weights.

    Args:
        folder: what `maskmatch export` wrote.

    Returns:
        The segmenter in eval mode, float32, on the CPU: logits equal those of the run's own.

    Raises:
        UserError: no export, or one whose tensors do not fit its description.
    """
    folder = Path(folder).resolve()  # absolute: no folder is taken for an official size of the same name
    description = read_description(folder)
    backbone = description.backbone
    if backbone.startswith("transformers/"):
        backbone = f"transformers/{folder if (folder / 'config.json').is_file() else folder / 'backbone'}"
    try:
        segmenter = build_segmenter(
            backbone,
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
