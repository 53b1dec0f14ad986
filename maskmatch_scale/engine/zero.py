"""The engine that calls DeepSpeed directly: a forward and its backward for each view, then one step.

Other orders of forwards and backwards give wrong results at some ZeRO stage, without an error (docs/zero.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from maskmatch_scale.checkpoints.pieces import Piece, StoredState
from maskmatch_scale.engine.deepspeed_json import merged, over
from maskmatch_scale.engine.ema import ReplicatedTeacher, average_of
from maskmatch_scale.engine.masters import FlatAverage, FlatMasters
from maskmatch_scale.engine.optim import adamw, parameter_groups
from maskmatch_scale.engine.parts import (
    Part,
    adamw_steps,
    buffer_pieces,
    part_pieces,
    restore_adamw,
    restore_buffers,
    restore_parts,
    whole_parts,
)
from maskmatch_scale.engine.precision import autocast, autocast_dtype, weights_dtype
from maskmatch_scale.engine.protocol import StepOrder, StoredTeacher, leaves_out
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.engine.schedule import GroupSettings, base_lr
from maskmatch_scale.engine.setup import import_deepspeed
from maskmatch_scale.engine.sharding import shard_deferred
from maskmatch_scale.engine.zero_parts import cut_parts, flat_parts, frozen_parts, weights_from_masters
from maskmatch_scale.recipe import Recipe

BUCKET_ELEMENTS = 25_000_000
"""Gradients that are averaged together. DeepSpeed's default, 5e8, is larger than most models: nothing would be averaged
before a backward pass ends, in buffers of 2 GB and more."""


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's settings for a recipe, merged with those of the user's file (`engine.deepspeed_json`).

    Keys whose defaults would change what the recipe means are always written out. Gradients of bf16 weights are added
    and averaged in fp32, and at stage 2 averaged during the backward pass, unless the file says otherwise.

    Args:
        recipe: of the run; its precision is not `auto` any more.
        world_size: number of ranks.

    Raises:
        UserError: `engine.deepspeed_json` cannot be read, contradicts the recipe or has a key that does not belong.
    """
    engine = recipe.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.micro_batch,
        # Every backward pass before a step adds to its gradients, however many there are: views and micro-batches.
        # At stage 0 DeepSpeed would average them inside its step, and their norm is computed here, before it.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": engine.zero_stage == 0,
        # Without the key DeepSpeed clips to 1.
        "gradient_clipping": recipe.optim.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    defaults: dict[str, Any] = {}
    if engine.zero_stage > 0:
        defaults["zero_optimization"] = {"reduce_bucket_size": BUCKET_ELEMENTS}
    if engine.zero_stage == 2:
        defaults["zero_optimization"]["overlap_comm"] = True
    if engine.precision in ("bf16", "fp16"):
        config[engine.precision] = {"enabled": True}
    if engine.precision == "bf16":
        defaults |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        # At stage 1 each bf16 gradient is freed when it has been added to the fp32 sum.
        defaults["bf16"] = {"immediate_grad_update": True}
    if engine.precision == "autocast-bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        # Gradients of the modules in this list would be averaged in bf16.
        defaults["torch_autocast"] = {"lower_precision_safe_modules": []}
    if engine.offload_optimizer:
        # With offloading DeepSpeed refuses an optimizer object. These settings make it build torch's AdamW itself.
        config["optimizer"] = {
            "type": "AdamW",
            "params": {"torch_adam": True, "lr": base_lr(recipe, world_size), "betas": list(recipe.optim.betas)},
        }
    return merged(defaults, config, recipe, world_size) if engine.deepspeed_json else over(defaults, config)


class ZeroEngine:
    """A module under DeepSpeed (`protocol.Engine`).

    Args:
        module: called once for each view; its ``segmenter`` is the student whose parameters are optimised.
        student: that segmenter.
        recipe: sections engine, optim and run are read.
        runtime: this rank.
    """

    every_gradient_first = True
    """At stage 3, and at stage 2 with offloading, only the first backward pass of a step writes gradients over those of
    the step before. Later ones add to them (DeepSpeed's `micro_step_id`)."""

    def __init__(self, module: nn.Module, student: nn.Module, recipe: Recipe, runtime: Runtime) -> None:
        self.name = f"ZeRO-{recipe.engine.zero_stage}"
        self.recipe = recipe
        self.runtime = runtime
        self.student = student
        self.grad_norm: Tensor | float | None = None
        self.skipped = False
        self._device = runtime.device
        self._order = StepOrder()
        config = deepspeed_config(recipe, runtime.world_size)
        shard_deferred(student, config, weights_dtype(recipe))
        for owner in module.modules():  # DeepSpeed moves no module that has sharded parameters already
            for name, buffer in owner.named_buffers(recurse=False):
                owner._buffers[name] = buffer.to(runtime.device)
        groups = parameter_groups(student, recipe.optim)
        self._groups = GroupSettings(groups, recipe, runtime.world_size)
        self.base_lr = self._groups.base_lr
        given: dict[str, Any] = {"model_parameters": groups}
        if "optimizer" not in config:
            given = {"optimizer": adamw(groups, self.base_lr, recipe.optim, runtime.device)}
        deepspeed = import_deepspeed()
        # A run under autocast leaves this on for the process; without autocast it would undo `communication_data_type`.
        deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        self._engine, *_ = deepspeed.initialize(model=module, config=config, **given)

    @staticmethod
    def check_settings(recipe: Recipe, world_size: int) -> None:
        """See `Engine`; the settings are those of `engine.deepspeed_json`."""
        if recipe.engine.deepspeed_json:
            deepspeed_config(recipe, world_size)

    def accumulate(self, *arguments: Any, last: bool) -> Tensor:
        """See `Engine`."""
        self._order.accumulate(last=last)
        if self.recipe.engine.zero_stage == 0:
            self._engine.set_gradient_accumulation_boundary(last)
        loss, figures = self._engine(*arguments)
        self._engine.backward(loss)
        result: Tensor = figures.detach()
        return result

    def step(self, number: int) -> None:
        """See `Engine`."""
        self._order.step()
        self._groups.set_lr(self._engine.optimizer.param_groups, number)
        if self.recipe.engine.zero_stage == 0:
            self._step_at_stage_0()
            return
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        # At stages 1 to 3 DeepSpeed leaves out a step with non-finite gradients in every precision.
        left_out = self._engine.skipped_steps > skipped_before
        if left_out and self.recipe.engine.zero_stage < 3:
            # With offloading DeepSpeed would add the next gradients to these.
            gradients = getattr(self._engine.optimizer, "averaged_gradients", {})
            gradients.update(dict.fromkeys(gradients))
        self.skipped = leaves_out(self.recipe) and left_out
        self.grad_norm = self._engine.get_global_grad_norm()

    def lr(self, number: int) -> float:
        """See `Engine`."""
        return self._groups.lr(number)

    def _step_at_stage_0(self) -> None:
        """A step without ZeRO, where DeepSpeed reports no norm of the gradients and takes every step."""
        self.grad_norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.student.parameters() if p.grad is not None]
        )
        self.skipped = leaves_out(self.recipe) and not bool(self.grad_norm.isfinite())
        if self.skipped:
            self._engine.zero_grad()
        else:
            self._engine.step()

    def arithmetic(self) -> AbstractContextManager[None]:
        """See `Engine`: 16-bit weights need no autocast."""
        if self.recipe.engine.precision in ("bf16", "fp16"):
            return nullcontext()
        return autocast(self._device, autocast_dtype(self.recipe))

    def store_teacher(self, average: nn.Module) -> StoredTeacher:
        """See `Engine`: sharded at stage 3, else whole on every rank."""
        if self.recipe.engine.zero_stage < 3:
            return ReplicatedTeacher(average, self)
        from maskmatch_scale.engine.sharded_teacher import ShardedTeacher

        return ShardedTeacher(
            average,
            self,
            self._device,
            bucket_size=self._engine.zero_prefetch_bucket_size(),
            max_live=self._engine.zero_max_live_parameters(),
        )

    def averager(self, averages: Sequence[nn.Parameter]) -> Callable[[float], None]:
        """See `Engine`. With 16-bit weights at stages 1 and 2 the masters are sharded, and are gathered in pieces."""
        engine, parameters = self.recipe.engine, list(self.student.parameters())
        if engine.precision not in ("bf16", "fp16"):
            return average_of(averages, parameters)
        pairs = [pair for pair in zip(averages, parameters, strict=True) if pair[1].requires_grad]
        flat = [FlatAverage(masters, pairs) for masters in FlatMasters.of(self._engine.optimizer)]
        assert sum(average.taken for average in flat) == len(pairs), "a parameter is in no group"

        def update(decay: float) -> None:
            for average in flat:
                average.update(decay)

        return update

    def pieces(self) -> Iterator[Piece]:
        """See `Engine`: from stage 1 on each rank gives what it holds, cut as it is. Nothing is sent."""
        yield from part_pieces(
            "student", self._parts(self.runtime.rank, self.runtime.world_size), self._engine.optimizer.state
        )
        yield from buffer_pieces("student", self.student, self.recipe, self.runtime)

    def progress(self) -> dict[str, Any]:
        """See `Engine`; the counters of the loss scaler are DeepSpeed's."""
        found: dict[str, Any] = {"optimizer_step": adamw_steps(self._engine.optimizer)}
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if scaler is not None and scaler.dynamic:
            found["loss_scaler"] = {key: getattr(scaler, name) for key, name in _SCALER.items()}
        return found

    def restore(self, stored: StoredState, progress: Mapping[str, Any]) -> None:
        """See `Engine`; at stages 1 and 2 the weights are gathered from the masters, as in a step."""
        optimizer, parts = self._engine.optimizer, list(self._parts())
        restore_parts("student", parts, stored)
        restore_adamw(optimizer, parts, stored, progress["optimizer_step"])
        restore_buffers("student", self.student, stored, self.recipe, self.runtime)
        if self.recipe.engine.zero_stage > 0:
            weights_from_masters(self.student, optimizer, self.recipe.engine.zero_stage)
        scaler = getattr(optimizer, "loss_scaler", None)
        if scaler is not None and scaler.dynamic:
            for key, value in progress.get("loss_scaler", {}).items():
                if key in _SCALER:  # others are of another library's scaler
                    setattr(scaler, _SCALER[key], value)

    def _parts(self, rank: int = 0, ranks: int = 1) -> Iterator[Part]:
        """What this rank holds of every parameter; of those that all have whole, the part of ``rank`` of ``ranks``."""
        stage = self.recipe.engine.zero_stage
        if stage == 0:
            return whole_parts(self.student.named_parameters(), rank, ranks)
        if stage == 3:
            return cut_parts(self.student)
        return chain(flat_parts(self.student, self._engine.optimizer), frozen_parts(self.student, rank, ranks))


_SCALER = {
    "scale": "cur_scale",
    "iteration": "cur_iter",
    "last_overflow": "last_overflow_iter",
    "hysteresis": "cur_hysteresis",
}
"""What `progress` calls the attributes of DeepSpeed's dynamic loss scaler."""
