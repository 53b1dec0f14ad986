"""Segmentation models whose forward pass skips masked units: `build_segmenter`, `Segmenter`, and `units`."""

from maskmatch_scale.models import units
from maskmatch_scale.models.segmenter import Segmenter, build_segmenter

__all__ = ["Segmenter", "build_segmenter", "units"]
