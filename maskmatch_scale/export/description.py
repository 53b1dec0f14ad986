"""`segmenter.json`: what an exported segmenter is, apart from its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from maskmatch_scale.data.images.bands import RGB_NAMES, Band
from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import EvaluationRecipe
from maskmatch_scale.recipe.values import SEGMENTER_FILE


class Description(BaseModel):
    """The contents of `segmenter.json`."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    backbone: str
    """As in the recipe. If it is a folder, only the name of the folder is kept, because the export has its files."""
    backbone_options: dict[str, Any]
    """Keyword arguments of timm.create_model; empty for a SegFormer, whose config.json has these settings."""
    head: str
    num_classes: int
    image_size: tuple[int, int]
    """Height and width of the crops it was trained on, px."""
    position_px: tuple[int, int] | None = None
    """Height and width of images, px, that the position embedding of a ViT is laid out for. None: it has none; or in an
    export that was written before this key existed, `image_size`."""
    unit_px: int
    """Side of a masking unit, px."""
    classes: tuple[str, ...]
    """The name of class v of the logits is ``classes[v]``; there may be fewer names than logits."""
    palette: tuple[tuple[int, int, int], ...]
    """One RGB colour for each name, 0–255."""
    ignore_index: int
    """Label value of pixels that were not counted."""
    bands: tuple[Band, ...] = ()
    """By input channel: name, and which stored values are 0 and 1 (`low`, `high`); in between in proportion, in 255
    steps, and outside 0 or 1. Empty, and not in the file: red, green and blue of 8 bits."""
    mean: tuple[float, ...]
    """A channel, of values in 0–1: subtract it from images."""
    std: tuple[float, ...]
    """A channel, of values in 0–1: then divide images by it."""
    evaluation: EvaluationRecipe = EvaluationRecipe()
    """How images are predicted: the run's section of this name, without `pictures`. An export that was written before
    this key existed is used with the defaults, which are windows of `image_size`."""
    exif_orientation: bool = False
    """Whether images are turned as their EXIF orientation says before they are predicted: `data.exif_orientation`."""
    weights: str
    """`ema` or `student`."""
    step: int
    """Number of optimizer steps that were taken."""
    versions: dict[str, str]
    """Versions of the packages with which it was written."""

    def to_json(self) -> str:
        """The contents of the file."""
        unsaid: dict[str, Any] = {"evaluation": {"pictures"}} | ({} if self.bands else {"bands": True})
        return self.model_dump_json(indent=1, exclude=unsaid)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the input channels."""
        return tuple(band.name for band in self.bands) or RGB_NAMES


def read_description(folder: Path) -> Description:
    """Read `segmenter.json`.

    Raises:
        UserError: there is no such file, or it is not valid.
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
