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

from maskmatch_scale.engine.masters import FlatAverage
from maskmatch_scale.engine.protocol import Engine
from maskmatch_scale.engine.setup import import_deepspeed
from maskmatch_scale.engine.zero import full_fp32
from maskmatch_scale.recipe import Recipe


class StoredTeacher(Protocol):
    """A teacher that can also be saved and restored."""

    patch_px: int
    module: nn.Module
    """The segmenter that holds the average."""

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to logits, without gradients."""

    def update(self, decay: float) -> None:
        """T ← decay · T + (1 - decay) · S."""

    def full_state(self, *, keep: bool) -> dict[str, Tensor]:
        """Whole fp32 state on the CPU; all ranks call it together, those with ``keep=False`` get an empty dict."""

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Put :meth:`full_state` back; all ranks call it together."""


def build_teacher(teacher: nn.Module, engine: Engine) -> StoredTeacher:
    """Wrap a copy of the student made before the engine took the student over.

    Args:
        teacher: Segmenter, fp32, in host memory.
        engine: of the student. Of its recipe zero_stage, precision and offload_parameters decide the storage and the
            arithmetic of the teacher's forward, ema_buffers what happens to buffers.
    """
    teacher.eval().requires_grad_(False)
    kind = ShardedTeacher if engine.recipe.engine.zero_stage == 3 else ReplicatedTeacher
    return kind(teacher, engine)


class _Teacher:
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


class ReplicatedTeacher(_Teacher):
    """The whole average on every rank."""

    def __init__(self, teacher: nn.Module, engine: Engine) -> None:
        super().__init__(teacher, engine)
        teacher.to(next(self.student.parameters()).device)
        pairs = list(zip(teacher.parameters(), self.student.parameters(), strict=True))
        self._averages: list[Tensor] = [average for average, _ in pairs]
        self._masters = [parameter for _, parameter in pairs]
        self._flat = [FlatAverage(masters, pairs) for masters in engine.flat_masters()]
        assert not self._flat or sum(flat.taken for flat in self._flat) == len(pairs), "a weight in no group"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Forward in the student's precision."""
        with autocast(images.device, self._dtype):
            logits: Tensor = self.module(images)
        return logits

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """One multi-tensor lerp; where masters are partitioned (16-bit weights) they are gathered piece by piece."""
        for flat in self._flat:
            flat.update(decay)
        if not self._flat:
            torch._foreach_lerp_(self._averages, [full_fp32(p) for p in self._masters], 1 - decay)
        self._update_buffers(decay)

    def full_state(self, *, keep: bool) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items() if keep}

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Strict."""
        self.module.load_state_dict(state)


class ShardedTeacher(_Teacher):
    """A second ZeRO-3 engine without an optimizer, whose shards line up with the student's."""

    def __init__(self, teacher: nn.Module, engine: Engine) -> None:
        super().__init__(teacher, engine)
        # With the default threshold small parameters are kept whole, and ignore what is written to their shards.
        zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
        if engine.recipe.engine.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        self._engine: Any
        self._engine, *_ = import_deepspeed().initialize(model=_Autocast(teacher, self._dtype), config=config)
        self._pairs = list(zip(teacher.parameters(), self.student.parameters(), strict=True))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Forward, gathering layer by layer: all ranks must call it equally often."""
        logits: Tensor = self._engine(images)
        return logits

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """One multi-tensor lerp of this rank's shards, no byte sent."""
        from deepspeed.utils import safe_get_local_fp32_param

        shards, masters = [], []
        for average, parameter in self._pairs:
            shard = _shard(average)
            master: Tensor = safe_get_local_fp32_param(parameter).flatten()
            shards.append(shard[: master.numel()])
            masters.append(master.to(shard.device))
        torch._foreach_lerp_(shards, masters, 1 - decay)
        self._update_buffers(decay)

    def full_state(self, *, keep: bool) -> dict[str, Tensor]:
        """Gathered one parameter at a time."""
        state = {name: buffer.detach().cpu().clone() for name, buffer in self.module.named_buffers()}
        for name, parameter in self.module.named_parameters():
            with _whole(parameter):
                if keep:
                    state[name] = parameter.detach().cpu().clone()
        return {name: state[name] for name in self.module.state_dict() if name in state and keep}

    @torch.no_grad()
    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Scattered one parameter at a time."""
        for name, buffer in self.module.named_buffers():
            if name in state:
                buffer.copy_(state[name])
        for name, parameter in self.module.named_parameters():
            with _whole(parameter, modifier_rank=0):
                parameter.copy_(state[name])


class _Autocast(nn.Module):
    """Autocast within the module: around an engine DeepSpeed switches it off on a GPU, with a single warning."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """As the module's."""
        with autocast(images.device, self.dtype):
            logits: Tensor = self.module(images)
        return logits


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


def autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    """What fp32 weights (the teacher's, and the student's under an autocast precision) are multiplied in."""
    precision = recipe.engine.precision
    return None if precision == "fp32" else torch.float16 if precision == "fp16" else torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """16-bit arithmetic on fp32 weights, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
