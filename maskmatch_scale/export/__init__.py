"""Trained models without their runs. `load_export` is here; writing, which needs the engine, is in `export.write`."""

from maskmatch_scale.export.load import load_export
from maskmatch_scale.export.segmenter import ExportedSegmenter, Prediction

__all__ = ["ExportedSegmenter", "Prediction", "load_export"]
