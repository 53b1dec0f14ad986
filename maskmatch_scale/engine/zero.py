"""DeepSpeed, driven directly: one call for all views, one backward, one step.

Any other order of forwards and backwards is silently wrong at some ZeRO stage (docs/zero.md): `StepOrder` refuses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskmatch_scale.engine.deepspeed_json import merged
from maskmatch_scale.engine.masters import FlatMasters
from maskmatch_scale.engine.optim import base_lr, lr_factor, parameter_groups
from maskmatch_scale.engine.protocol import StepOrder
from maskmatch_scale.engine.setup import Runtime, import_deepspeed
from maskmatch_scale.recipe import Recipe


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a recipe, keys whose defaults surprise always written out, and what the user's file adds.

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
        "gradient_accumulation_steps": engine.accumulation,
        # Without the key DeepSpeed clips to 1.
        "gradient_clipping": recipe.optim.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if engine.precision in ("bf16", "fp16"):
        config[engine.precision] = {"enabled": True}
    if engine.precision == "autocast-bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if engine.offload_optimizer:
        # DeepSpeed refuses an optimizer of ours beside offloading; this is torch's AdamW all the same, not compiled.
        config["optimizer"] = {
            "type": "AdamW",
            "params": {"torch_adam": True, "lr": base_lr(recipe, world_size), "betas": list(recipe.optim.betas)},
        }
    return merged(config, recipe, world_size) if engine.deepspeed_json else config


class ZeroEngine:
    """A module under DeepSpeed (`protocol.Engine`).

    Args:
        module: called once a micro-batch; its ``segmenter`` is the student whose parameters are optimised.
        student: that segmenter.
        recipe: sections engine, optim and run are read.
        runtime: this rank.
    """

    def __init__(self, module: nn.Module, student: nn.Module, recipe: Recipe, runtime: Runtime) -> None:
        self.recipe = recipe
        self.student = student
        self.module = module
        self.grad_norm: Tensor | float | None = None
        self.skipped = False
        self._base_lr = base_lr(recipe, runtime.world_size)
        self._order = StepOrder(recipe.engine.accumulation)
        groups = parameter_groups(student, recipe.optim)
        # Kept here: a loaded checkpoint brings its own groups, but the recipe decides.
        self._groups = [{key: group[key] for key in ("lr_scale", "weight_decay")} for group in groups]
        config = deepspeed_config(recipe, runtime.world_size)
        given: dict[str, Any] = {"model_parameters": groups}
        if "optimizer" not in config:
            given = {"optimizer": torch.optim.AdamW(groups, lr=self._base_lr, betas=recipe.optim.betas)}
        self._engine, *_ = import_deepspeed().initialize(model=module, config=config, **given)

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        self._order.forward()
        result: tuple[Tensor, Tensor] = self._engine(*arguments)
        return result

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        last = self._order.backward()
        self._engine.backward(loss)
        if not last:
            # DeepSpeed counts micro-batches in its step(): without this call the real step would do nothing.
            self._engine.step()

    def leave_out(self) -> None:
        """See `Engine`."""
        self._order.leave_out()

    def step(self, number: int) -> None:
        """See `Engine`."""
        self._order.step()
        for group, own in zip(self._engine.optimizer.param_groups, self._groups, strict=True):
            group["lr"] = own["lr_scale"] * self.lr(number)
        self.grad_norm = self._plain_grad_norm()
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        # In every precision DeepSpeed leaves out a step with gradients that are not finite; only a loss scale mends it.
        self.skipped = self.recipe.engine.precision == "fp16" and self._engine.skipped_steps > skipped_before
        if self.grad_norm is None:
            self.grad_norm = self._engine.get_global_grad_norm()

    def lr(self, number: int) -> float:
        """See `Engine`."""
        return self._base_lr * lr_factor(number, self.recipe.run.steps, self.recipe.optim)

    def _plain_grad_norm(self) -> Tensor | None:
        """At stage 0 in fp32 DeepSpeed wraps nothing and reports no norm."""
        if self.recipe.engine.zero_stage > 0:
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.student.parameters() if p.grad is not None])

    def full_fp32_parameters(self, *, keep: bool) -> dict[str, Tensor]:
        """See `Engine`; a collective at stage 3 and with 16-bit weights."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.student.named_parameters():
            value = full_fp32(parameter)
            if keep:
                state[name] = value.cpu()
        return state

    def flat_masters(self) -> list[FlatMasters]:
        """See `Engine`; with 16-bit weights at stages 1 and 2."""
        engine = self.recipe.engine
        shared = engine.precision in ("bf16", "fp16") and engine.zero_stage in (1, 2)
        return FlatMasters.of(self._engine.optimizer) if shared else []

    def save(self, folder: Path) -> None:
        """See `Engine`: masters and optimizer state, each rank its shard."""
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        optim, optimizer = self.recipe.optim, self._engine.optimizer
        for group, own in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(own, betas=optim.betas)
        if hasattr(optimizer, "clip_grad"):
            # At stages 1 and 2 DeepSpeed goes on with the limit of the checkpoint.
            optimizer.clip_grad = optim.clip_norm or 0.0


def full_fp32(parameter: nn.Parameter) -> Tensor:
    """A parameter's whole fp32 master value; all ranks must call it together."""
    if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import_deepspeed()
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor | None = safe_get_full_fp32_param(parameter)
    assert value is not None, "DeepSpeed knows no fp32 master of this parameter"
    return value.detach().view(getattr(parameter, "ds_shape", parameter.shape))
