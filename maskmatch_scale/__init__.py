"""Semi-supervised segmentation with MaskMatch (arXiv 2312.08631), for large ViTs and SegFormers at cluster scale."""

__version__ = "0.1.0"
