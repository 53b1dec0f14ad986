"""How fast a run is, beside images/s: tokens/s, and MFU, the share of a GPU's peak that the backbone's work takes."""

from __future__ import annotations

import torch

from maskmatch_scale.device_peaks import peak_tflops
from maskmatch_scale.engine.precision import autocast_dtype, uses_tf32
from maskmatch_scale.training.callbacks.base import Callback
from maskmatch_scale.training.run import Run
from maskmatch_scale.training.step import StepFigures


class Throughput(Callback):
    """Adds `tokens_per_s` and `mfu` to the figures of every step; docs/watching.md defines both.

    `mfu` (Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B) is None on a CPU, on a GPU that is not in
    `device_peaks.PEAKS`, and for a step that was left out.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        device, precision = run.runtime.device, run.recipe.engine.precision
        dtype = autocast_dtype(run.recipe) or torch.float32
        self._peak_tflops = peak_tflops(device, dtype, tf32=uses_tf32(device, precision))

    def after_step(self, done: int, figures: StepFigures) -> None:
        """Add functions that give the figures when the step's time is known; nothing here waits for the device."""
        work = self.run.work_in(done - 1)
        step_s = figures.later["step_s"]
        tokens = work.tokens * self.run.runtime.world_size
        figures.later["tokens_per_s"] = lambda: tokens / step_s()
        figures.known["mfu"] = None
        if self._peak_tflops is not None and not figures.left_out:
            at_peak_s = work.flops / (self._peak_tflops * 1e12)
            figures.later["mfu"] = lambda: at_peak_s / step_s()
