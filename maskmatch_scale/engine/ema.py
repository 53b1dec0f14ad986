"""The teacher's storage: an fp32 average of the student's fp32 master weights.

Replicated on every rank at ZeRO 0-2. At ZeRO-3 sharded like the student, each rank averaging its own shard without any
communication. The average must be fp32: in bf16, with decay 0.999, a step is lost in rounding and the teacher stalls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maskmatch_scale.engine.zero import full_fp32
from maskmatch_scale.recipe import EngineRecipe


class StoredTeacher(Protocol):
    """A teacher that can also be saved and restored."""

    patch_px: int

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to logits, without gradients."""

    def update(self, decay: float) -> None:
        """T ← decay · T + (1 - decay) · S."""

    def full_state(self) -> dict[str, Tensor]:
        """Whole fp32 state on the CPU; all ranks call it together."""

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Put :meth:`full_state` back; all ranks call it together."""


def build_teacher(teacher: nn.Module, student: nn.Module, engine: EngineRecipe) -> StoredTeacher:
    """Wrap a copy of the student made before DeepSpeed took the student over.

    Args:
        teacher: Segmenter, fp32, on the device.
        student: the one that DeepSpeed trains, already wrapped.
        engine: zero_stage and precision decide the storage and the arithmetic of the teacher's forward.
    """
    teacher.eval().requires_grad_(False)
    kind = ShardedTeacher if engine.zero_stage == 3 else ReplicatedTeacher
    return kind(teacher, student, bf16=engine.precision != "fp32")


class ReplicatedTeacher:
    """The whole average on every rank."""

    def __init__(self, teacher: nn.Module, student: nn.Module, *, bf16: bool) -> None:
        self.module = teacher
        self.student = student
        self.patch_px = int(getattr(teacher, "patch_px", 1))
        self._bf16 = bf16
        self._averages: list[Tensor] = list(teacher.parameters())
        self._masters = list(student.parameters())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Forward in the student's precision."""
        with autocast(images.device, self._bf16):
            logits: Tensor = self.module(images)
        return logits

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """One multi-tensor lerp; where masters are partitioned (bf16) they are gathered one by one."""
        masters = [full_fp32(parameter) for parameter in self._masters]
        torch._foreach_lerp_(self._averages, masters, 1 - decay)
        average_buffers(self.module, self.student, decay)

    def full_state(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Strict."""
        self.module.load_state_dict(state)


class ShardedTeacher:
    """A second ZeRO-3 engine without an optimizer, whose shards line up with the student's."""

    def __init__(self, teacher: nn.Module, student: nn.Module, *, bf16: bool) -> None:
        import deepspeed

        self.module = teacher
        self.student = student
        self.patch_px = int(getattr(teacher, "patch_px", 1))
        self._bf16 = bf16
        config = {
            "train_micro_batch_size_per_gpu": 1,
            # With the default threshold small parameters are kept whole, and ignore what is written to their shards.
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=teacher, config=config)
        self._pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
        self._shards = [_shard(average).detach().clone().float() for average, _ in self._pairs]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Forward, gathering layer by layer: all ranks must call it equally often."""
        with autocast(images.device, self._bf16):
            logits: Tensor = self._engine(images)
        return logits

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Each rank its own shard, no byte sent."""
        from deepspeed.utils import safe_get_local_fp32_param

        for shard, (average, parameter) in zip(self._shards, self._pairs, strict=True):
            master: Tensor = safe_get_local_fp32_param(parameter)
            shard[: master.numel()].lerp_(master.flatten(), 1 - decay)
            _shard(average).copy_(shard)
        average_buffers(self.module, self.student, decay)

    def full_state(self) -> dict[str, Tensor]:
        """Gathered one parameter at a time."""
        state = {name: buffer.detach().cpu().clone() for name, buffer in self.module.named_buffers()}
        for name, parameter in self.module.named_parameters():
            with _whole(parameter):
                state[name] = parameter.detach().float().cpu().clone()
        return {name: state[name] for name in self.module.state_dict() if name in state}

    @torch.no_grad()
    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Scattered one parameter at a time."""
        for name, buffer in self.module.named_buffers():
            buffer.copy_(state[name])
        for name, parameter in self.module.named_parameters():
            with _whole(parameter, modifier_rank=0):
                parameter.copy_(state[name])
        for shard, (average, _) in zip(self._shards, self._pairs, strict=True):
            shard.copy_(_shard(average))


@torch.no_grad()
def average_buffers(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Floating buffers (BatchNorm's statistics) are averaged like parameters, integer ones (its counter) copied."""
    for average, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        if average.is_floating_point():
            average.lerp_(buffer.to(average), 1 - decay)
        else:
            average.copy_(buffer)


def _shard(parameter: nn.Parameter) -> Tensor:
    """This rank's flat shard of a ZeRO-3 parameter."""
    shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return shard


@contextmanager
def _whole(parameter: nn.Parameter, modifier_rank: int | None = None) -> Iterator[None]:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank):
        yield


def autocast(device: torch.device, bf16: bool) -> Any:
    """bf16 arithmetic on fp32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
