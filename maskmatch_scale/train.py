"""`train` under the name that docs/design.md promises; the code is in `maskmatch_scale/training/loop.py`."""

from maskmatch_scale.training.loop import train

__all__ = ["train"]
