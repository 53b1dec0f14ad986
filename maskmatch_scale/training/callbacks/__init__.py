"""What watches or interrupts a run, one concern a file.

To add one, write a file with a subclass of :class:`Callback`, and name it in `CALLBACKS`; the moments are in `base.py`.
A callback that its recipe does not ask for does nothing. Users pass their own to
:func:`maskmatch_scale.train.train` instead.
"""

from maskmatch_scale.training.callbacks.base import Callback, Record
from maskmatch_scale.training.callbacks.checkpoints import Checkpoints
from maskmatch_scale.training.callbacks.closing import Closing
from maskmatch_scale.training.callbacks.evaluation import Evaluation
from maskmatch_scale.training.callbacks.metrics import Metrics
from maskmatch_scale.training.callbacks.nonfinite import NonFinite
from maskmatch_scale.training.callbacks.opening import Opening
from maskmatch_scale.training.callbacks.progress import Progress
from maskmatch_scale.training.callbacks.skips import Skips
from maskmatch_scale.training.callbacks.time_spent import TimeSpent

CALLBACKS: tuple[type[Callback], ...] = (
    Opening,
    TimeSpent,
    Metrics,
    NonFinite,  # before all that show or keep figures
    Progress,
    Skips,
    Checkpoints,  # before the evaluation, which may take long
    Evaluation,
    Closing,
)
"""Those of every run, in the order in which they are called."""

__all__ = ["CALLBACKS", "Callback", "Record"]
