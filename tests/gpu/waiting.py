"""An error for every wait of the host within a step, as torch's sync debug mode sees them.

DeepSpeed waits within its own backward and step (for the gradient norm, to look for overflows), and at ZeRO-3 on one
rank also where it makes a module's weights whole before the module's forward (seen on an H100: `NoGatherHandle.wait`
synchronises the stream). There waits are counted and not refused; under accelerate, which waits for nothing, they are
refused in the whole step.
"""

import warnings

import torch

from maskmatch_scale.training.callbacks import Callback

FIRST = 3
"""Steps that may wait: they make what is kept, such as weights of upsampling and NCCL's communicators."""


class NoWaiting(Callback):
    """Switches the mode on for every step, and off between them."""

    counts = None
    """Waits of DeepSpeed's own backward and step in the last run."""

    def __init__(self, run):
        super().__init__(run)
        self.on = self.inside = False
        type(self).counts = {"backward": 0, "step": 0, "fetch": 0}
        if run.recipe.engine.library == "deepspeed":
            # Our engine's step also reads what DeepSpeed's has found: the norm, and whether the step was taken.
            for engine, name in ((run.engine._engine, "backward"), (run.engine, "step")):
                setattr(engine, name, self._counted(name, getattr(engine, name)))
            if run.recipe.engine.zero_stage == 3:
                coordinator = run.engine._engine.optimizer.parameter_offload.get_param_coordinator()
                coordinator.fetch_sub_module = self._counted("fetch", coordinator.fetch_sub_module)

    def before_step(self, step):
        if step >= FIRST:
            self.on = True
            self.set("error")

    def after_step(self, done, figures):
        self.on = False
        self.set("default")

    def ended(self):
        self.set("default")

    def _counted(self, name, plain):
        def counted(*arguments, **named):
            if not self.on or self.inside:
                return plain(*arguments, **named)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.inside = True
                self.set("warn")
                result = plain(*arguments, **named)
                self.set("error")
                self.inside = False
            self.counts[name] += sum("synchronizing" in str(warning.message) for warning in caught)
            return result

        return counted

    @staticmethod
    def set(mode):
        """Without a GPU there is no such mode."""
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode(mode)
