"""The stored teacher: an fp32 average of the student's fp32 master weights.

Every rank keeps the whole average, or, at ZeRO-3, its shard of it (`sharded_teacher.py`). The average must be fp32: in
bf16, with a decay of 0.999, an update is lost in rounding and the teacher does not change.

Decision: docs/decisions/0018-teacher-copied-before-averaged-after.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from maskmatch_scale.engine.precision import autocast, autocast_dtype
from maskmatch_scale.engine.protocol import Engine, StoredTeacher


def build_teacher(average: nn.Module, engine: Engine) -> StoredTeacher:
    """Make the teacher from a copy of the student that was made before the engine took the student over.

    Args:
        average: the copy: a segmenter, fp32, in host memory.
        engine: of the student; it decides where the average is kept. The precision of its recipe sets the arithmetic of
            the teacher's forward, and `method.ema_buffers` says what happens to buffers.
    """
    return engine.store_teacher(average.eval().requires_grad_(False))


class Teacher:
    """Base of both kinds of stored teacher: the precision of its forward, and the update of its buffers."""

    def __init__(self, teacher: nn.Module, engine: Engine) -> None:
        recipe = engine.recipe
        self.module = teacher
        self.student = engine.student
        self.patch_px = int(getattr(teacher, "patch_px", 1))
        self._copies_buffers = recipe.method.ema_buffers == "copy"
        self._dtype = autocast_dtype(recipe)

    def gathered(self) -> AbstractContextManager[None]:
        """See `StoredTeacher`; a teacher that is whole needs no gathering."""
        return nullcontext()

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
        """Average the parameters, by the engine's function, and then the buffers."""
        self._average(decay)
        self._update_buffers(decay)

    def full_state(self, *, keep: bool) -> dict[str, Tensor]:
        """See `StoredTeacher`; no collective: every rank has the whole average."""
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items() if keep}

    def load_full_state(self, state: Mapping[str, Tensor]) -> None:
        """See `StoredTeacher`; every name must be there, and no other."""
        self.module.load_state_dict(state)


@torch.no_grad()
def average_buffers(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Average floating-point buffers (BatchNorm's statistics) like parameters; copy integer buffers (its counter)."""
    for average, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        if average.is_floating_point():
            average.lerp_(buffer.to(average), 1 - decay)
        else:
            average.copy_(buffer)
