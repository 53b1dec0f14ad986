"""The engine that calls DeepSpeed directly: a forward and its backward for each view, then one step.

Other orders of forwards and backwards give wrong results at some ZeRO stage, without an error (docs/zero.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskmatch_scale.engine.deepspeed_json import merged, over
from maskmatch_scale.engine.ema import ReplicatedTeacher
from maskmatch_scale.engine.masters import FlatAverage, FlatMasters
from maskmatch_scale.engine.optim import adamw, parameter_groups
from maskmatch_scale.engine.precision import autocast, autocast_dtype, weights_dtype
from maskmatch_scale.engine.protocol import StepOrder, StoredTeacher, leaves_out
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.engine.schedule import GroupSettings, base_lr
from maskmatch_scale.engine.setup import import_deepspeed
from maskmatch_scale.engine.sharding import shard_deferred
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

    def full_fp32_parameters(self, *, keep: bool) -> dict[str, Tensor]:
        """See `Engine`; a collective at stage 3 and with 16-bit weights."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.student.named_parameters():
            value = full_fp32(parameter)
            if keep:
                state[name] = value.cpu()
        return state

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
        if engine.precision not in ("bf16", "fp16") or engine.zero_stage not in (1, 2):
            return lambda decay: torch._foreach_lerp_(list(averages), [full_fp32(p) for p in parameters], 1 - decay)
        pairs = list(zip(averages, parameters, strict=True))
        flat = [FlatAverage(masters, pairs) for masters in FlatMasters.of(self._engine.optimizer)]
        assert sum(average.taken for average in flat) == len(pairs), "a parameter is in no group"

        def update(decay: float) -> None:
            for average in flat:
                average.update(decay)

        return update

    def save(self, folder: Path) -> None:
        """See `Engine`: each rank writes its shard of the masters and of the optimizer state."""
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        optimizer = self._engine.optimizer
        self._groups.restore(optimizer.param_groups)
        if hasattr(optimizer, "clip_grad"):
            # At stages 1 and 2 DeepSpeed would go on with the clipping of the checkpoint.
            optimizer.clip_grad = self.recipe.optim.clip_norm or 0.0


def full_fp32(parameter: nn.Parameter) -> Tensor:
    """The whole fp32 master of a parameter, in its shape; all ranks call it together."""
    if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import_deepspeed()
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor | None = safe_get_full_fp32_param(parameter)
    assert value is not None, "DeepSpeed knows no fp32 master of this parameter"
    return value.detach().view(getattr(parameter, "ds_shape", parameter.shape))
