"""The stored teacher: an fp32 average of the student's fp32 master weights.

Every rank keeps the whole average, or, at ZeRO-3, its shard of it (`sharded_teacher.py`). The average must be fp32: in
bf16, with a decay of 0.999, an update is lost in rounding and the teacher does not change.

Decision: docs/decisions/0018-teacher-copied-before-averaged-after.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from maskmatch_scale.checkpoints.pieces import Piece, StoredState
from maskmatch_scale.engine.parts import Part, buffer_pieces, part_pieces, restore_buffers, restore_parts, whole_parts
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
    """Base of both kinds of stored teacher: the precision of its forward, its buffers, and its state as pieces."""

    def __init__(self, teacher: nn.Module, engine: Engine) -> None:
        recipe = engine.recipe
        self.module = teacher
        self.student = engine.student
        self._recipe = engine.recipe
        self._runtime = engine.runtime
        self.patch_px = int(getattr(teacher, "patch_px", 1))
        self._copies_buffers = recipe.method.ema_buffers == "copy"
        self._dtype = autocast_dtype(recipe)

    def gathered(self) -> AbstractContextManager[None]:
        """See `StoredTeacher`; a teacher that is whole needs no gathering."""
        return nullcontext()

    def pieces(self) -> Iterator[Piece]:
        """See `StoredTeacher`."""
        yield from part_pieces("ema", self._parts())
        yield from buffer_pieces("ema", self.module, self._recipe, self._runtime)

    def restore(self, stored: StoredState) -> None:
        """See `StoredTeacher`. Of what was trained and is frozen now it takes the student's weights."""
        names, held = set(stored.names()), list(self._held())
        frozen = {name for name, parameter in self.student.named_parameters() if not parameter.requires_grad}
        now_frozen = {name for name in frozen if f"exp_avg/{name}" in names}
        restore_parts("ema", (part for part in held if part.name not in now_frozen), stored)
        restore_parts("student", (part for part in held if part.name in now_frozen), stored)
        restore_buffers("ema", self.module, stored, self._recipe, self._runtime)

    def _held(self) -> Iterator[Part]:
        """What this rank holds of the average."""
        raise NotImplementedError

    def _parts(self) -> Iterator[Part]:
        """What it gives of that; all ranks together give each element once."""
        return self._held()

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

    def _held(self) -> Iterator[Part]:
        return whole_parts(self.module.named_parameters())

    def _parts(self) -> Iterator[Part]:
        return whole_parts(self.module.named_parameters(), self._runtime.rank, self._runtime.world_size)


def average_of(averages: Sequence[nn.Parameter], parameters: Sequence[nn.Parameter]) -> Callable[[float], None]:
    """A function of the decay that averages fp32 weights which are whole on this rank.

    Frozen weights are left out: their average is the copy that was made of them.
    """
    pairs = [pair for pair in zip(averages, parameters, strict=True) if pair[1].requires_grad]
    own: list[Tensor] = [average for average, _ in pairs]
    return lambda decay: torch._foreach_lerp_(own, [parameter.detach() for _, parameter in pairs], 1 - decay)


@torch.no_grad()
def average_buffers(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Average floating-point buffers (BatchNorm's statistics) like parameters; copy integer buffers (its counter)."""
    for average, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        if average.is_floating_point():
            average.lerp_(buffer.to(average), 1 - decay)
        else:
            average.copy_(buffer)
