"""Callbacks: code that watches or interrupts a run, one concern in each file.

To add one, write a file with a subclass of :class:`Callback`, and name it in `CALLBACKS`; `base.py` explains when each
method is called. Every run has all of these callbacks: one that the recipe does not ask for must do nothing. Users can
pass callbacks of their own to :func:`maskmatch_scale.train.train` instead.

Decision: docs/decisions/0033-callbacks-watch-the-run.md.
"""

from maskmatch_scale.training.callbacks.base import Callback, Record
from maskmatch_scale.training.callbacks.checkpoints import Checkpoints
from maskmatch_scale.training.callbacks.closing import Closing
from maskmatch_scale.training.callbacks.early_end import EarlyEnd
from maskmatch_scale.training.callbacks.evaluation import Evaluation
from maskmatch_scale.training.callbacks.fetching import Fetching
from maskmatch_scale.training.callbacks.gpu_memory import GpuMemory
from maskmatch_scale.training.callbacks.live_report import LiveReport
from maskmatch_scale.training.callbacks.metrics import Metrics
from maskmatch_scale.training.callbacks.nonfinite import NonFinite
from maskmatch_scale.training.callbacks.opening import Opening
from maskmatch_scale.training.callbacks.profile import Profile
from maskmatch_scale.training.callbacks.progress import Progress
from maskmatch_scale.training.callbacks.skips import Skips
from maskmatch_scale.training.callbacks.throughput import Throughput
from maskmatch_scale.training.callbacks.time_limit import TimeLimit
from maskmatch_scale.training.callbacks.time_spent import TimeSpent
from maskmatch_scale.training.callbacks.trackers import Trackers

CALLBACKS: tuple[type[Callback], ...] = (
    Opening,
    TimeSpent,
    GpuMemory,  # these three before Metrics: they add figures to the step's
    Throughput,
    Fetching,
    Metrics,
    NonFinite,  # before Progress and Skips, which would show and count figures of a run that is stopped
    Progress,
    TimeLimit,
    Skips,
    EarlyEnd,
    Checkpoints,  # before Evaluation, which may take long
    Evaluation,
    Profile,
    LiveReport,
    Trackers,  # after those that write records at the end
    Closing,
)
"""The callbacks of every run, in the order in which they are called."""

__all__ = ["CALLBACKS", "Callback", "Record"]
