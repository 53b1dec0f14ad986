"""The stored teacher: an fp32 average of the student's fp32 master weights.

Every rank keeps the whole average, or, at ZeRO-3, its shard of it (`sharded_teacher.py`). The average must be fp32: in
bf16, with a decay of 0.999, a step is lost in rounding and the teacher stands still.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskmatch_scale.engine.precision import autocast, autocast_dtype
from maskmatch_scale.engine.protocol import Engine, StoredTeacher


def build_teacher(average: nn.Module, engine: Engine) -> StoredTeacher:
    """Wrap a copy of the student that was made before the engine took the student over.

    Args:
        average: Segmenter, fp32, in host memory.
        engine: of the student; it decides where the average is kept. Of its recipe the precision decides the arithmetic
            of the teacher's forward, and `method.ema_buffers` what happens to buffers.
    """
    return engine.store_teacher(average.eval().requires_grad_(False))


class Teacher:
    """What both kinds share: the forward in the student's arithmetic, and buffers."""

    def __init__(self, teacher: nn.Module, engine: Engine) -> None:
        recipe = engine.recipe
        self.module = teacher
        self.student = engine.student
        self.patch_px = int(getattr(teacher, "patch_px", 1))
        self._copies_buffers = recipe.method.ema_buffers == "copy"
        self._dtype = autocast_dtype(recipe)

    def _update_buffers(self, decay: float) -> None:
        average_buffers(self.module, self.student, 0.0 if self._copies_buffers else decay)


class ReplicatedTeacher(Teacher):
    """The whole average on every rank."""

    def __init__(self, teacher: nn.Module, engine: Engine) -> None:
        super().__init__(teacher, engine)
        teacher.to(next(self.student.parameters()).device)
        self._average = engine.averager(list(teacher.parameters()))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Forward in the student's precision."""
        with autocast(images.device, self._dtype):
            logits: Tensor = self.module(images)
        return logits

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """The engine averages the parameters, wherever it keeps the masters; then come the buffers."""
        self._average(decay)
        self._update_buffers(decay)

    def full_state(self, *, keep: bool) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items() if keep}

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Strict."""
        self.module.load_state_dict(state)


@torch.no_grad()
def average_buffers(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Floating buffers (BatchNorm's statistics) are averaged like parameters, integer ones (its counter) copied."""
    for average, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        if average.is_floating_point():
            average.lerp_(buffer.to(average), 1 - decay)
        else:
            average.copy_(buffer)
