"""The teacher at ZeRO-3: its average is sharded like the student, and each rank averages its own shards.

The teacher is a second ZeRO-3 engine, which shards the same parameters in the same way. So an update sends nothing.

Decision: docs/decisions/0018-teacher-copied-before-averaged-after.md.
Decision: docs/decisions/0019-sharded-teacher-in-place.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maskmatch_scale.engine.ema import Teacher
from maskmatch_scale.engine.precision import autocast
from maskmatch_scale.engine.protocol import Engine
from maskmatch_scale.engine.setup import import_deepspeed
from maskmatch_scale.engine.sharding import shard_deferred


class ShardedTeacher(Teacher):
    """A second ZeRO-3 engine, without an optimizer, with the same shards as the student's."""

    def __init__(self, teacher: nn.Module, engine: Engine) -> None:
        super().__init__(teacher, engine)
        # With the default threshold small parameters are kept whole, and writing to their shards has no effect.
        zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
        if engine.recipe.engine.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        shard_deferred(teacher, config, torch.float32)
        self._engine: Any
        self._engine, *_ = import_deepspeed().initialize(model=_Autocast(teacher, self._dtype), config=config)
        self._pairs = list(zip(teacher.parameters(), self.student.parameters(), strict=True))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Forward, which gathers layer by layer: all ranks must call it equally often."""
        logits: Tensor = self._engine(images)
        return logits

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """One multi-tensor lerp of this rank's shards; nothing is sent."""
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
        """See `StoredTeacher`; one parameter is gathered at a time."""
        state = {name: buffer.detach().cpu().clone() for name, buffer in self.module.named_buffers()}
        for name, parameter in self.module.named_parameters():
            with _whole(parameter):
                if keep:
                    state[name] = parameter.detach().cpu().clone()
        return {name: state[name] for name in self.module.state_dict() if name in state and keep}

    @torch.no_grad()
    def load_full_state(self, state: Mapping[str, Tensor]) -> None:
        """See `StoredTeacher`; one parameter is scattered at a time, from rank 0."""
        for name, buffer in self.module.named_buffers():
            if name in state:
                buffer.copy_(state[name])
        for name, parameter in self.module.named_parameters():
            with _whole(parameter, modifier_rank=0):
                parameter.copy_(state[name])


class _Autocast(nn.Module):
    """Enters autocast inside the module: around an engine DeepSpeed switches it off on a GPU, and warns only once."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """The module's forward, under autocast."""
        with autocast(images.device, self.dtype):
            logits: Tensor = self.module(images)
        return logits


def _shard(parameter: nn.Parameter) -> Tensor:
    """This rank's flat shard of a ZeRO-3 parameter."""
    shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return shard


@contextmanager
def _whole(parameter: nn.Parameter, modifier_rank: int | None = None) -> Iterator[None]:
    """Gather a parameter for the body; at the end the changes of ``modifier_rank``, if given, go to all shards."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank):
        yield
