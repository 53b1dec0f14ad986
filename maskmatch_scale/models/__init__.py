"""Segmentation models whose forward pass skips masked units: `build_segmenter`, `Segmenter`, and `units`."""

from maskmatch_scale.models import units
from maskmatch_scale.models.build import build_segmenter
from maskmatch_scale.models.segmenter import Segmenter

__all__ = ["Segmenter", "build_segmenter", "units"]
