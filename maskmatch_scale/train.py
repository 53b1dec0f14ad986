"""`train`, where docs/design.md's contract has it; the code is in `maskmatch_scale.training`."""

from maskmatch_scale.training.loop import train

__all__ = ["train"]
