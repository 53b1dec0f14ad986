"""The trackers that `record.trackers` may name.

To add one: write a class of `record/trackers/protocol.py` in a file of its own, add a line to `TRACKERS`, and an extra
of the same name to setup.cfg.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrackerInfo:
    """What is known about a tracker without importing it."""

    implementation: str
    """`module:class`. It is a string, because only the trackers that a recipe asks for are imported."""
    library: str
    """The module that has to be installed."""


TRACKERS: dict[str, TrackerInfo] = {
    "tensorboard": TrackerInfo("maskmatch_scale.record.trackers.tensorboard:TensorBoard", "tensorboard"),
    "wandb": TrackerInfo("maskmatch_scale.record.trackers.wandb:Wandb", "wandb"),
    "mlflow": TrackerInfo("maskmatch_scale.record.trackers.mlflow:Mlflow", "mlflow"),
    "trackio": TrackerInfo("maskmatch_scale.record.trackers.trackio:Trackio", "trackio"),
}
"""By name; `pip install 'maskmatch_scale[NAME]'` installs the library."""
