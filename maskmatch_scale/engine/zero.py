"""DeepSpeed, driven directly: one call for all views, one backward, one step.

Any other order of forwards and backwards is silently wrong at some ZeRO stage (docs/zero.md). For each micro-batch call
:meth:`ZeroEngine.forward` and then :meth:`ZeroEngine.backward`, once each, and :meth:`ZeroEngine.step` after the last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskmatch_scale.engine.optim import build_optimizer, lr_factor
from maskmatch_scale.engine.setup import Runtime
from maskmatch_scale.recipe import Recipe


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's JSON for a recipe; keys whose defaults surprise are always written out."""
    engine = recipe.engine
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.micro_batch,
        "gradient_accumulation_steps": engine.accumulation,
        # Without the key DeepSpeed clips to 1.
        "gradient_clipping": recipe.optim.clip_norm or 0.0,
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if engine.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if engine.precision == "autocast-bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


class ZeroEngine:
    """A module under DeepSpeed.

    Args:
        module: called once a micro-batch; its ``segmenter`` is the student whose parameters are optimised.
        student: that segmenter.
        recipe: sections engine, optim and run are read.
        runtime: this rank.
    """

    def __init__(self, module: nn.Module, student: nn.Module, recipe: Recipe, runtime: Runtime) -> None:
        import deepspeed

        self.recipe = recipe
        self.device = runtime.device
        self.student = student
        self.module = module
        optimizer = build_optimizer(student, recipe.optim)
        # Kept here: a loaded checkpoint brings its own groups, but the recipe decides the learning rate.
        self._peak_lrs = [group["peak_lr"] for group in optimizer.param_groups]
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(recipe))
        self._grad_norm: Tensor | float | None = None

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine, for its checkpoints."""
        return self._engine

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The module's (loss, sums) for one micro-batch."""
        result: tuple[Tensor, Tensor] = self._engine(*arguments)
        return result

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch; reduced over ranks after the last one of a step."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            # DeepSpeed counts micro-batches in its step(): without this call the real step would do nothing.
            self._engine.step()

    def step(self, number: int) -> None:
        """Set the learning rate of optimizer step ``number`` (from 0) and take it."""
        factor = lr_factor(number, self.recipe.run.steps, self.recipe.optim)
        for group, peak in zip(self._engine.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * factor
        self._grad_norm = self._plain_grad_norm()
        self._engine.step()
        if self._grad_norm is None:
            self._grad_norm = self._engine.get_global_grad_norm()

    def lr(self, number: int) -> float:
        """Learning rate of the backbone at optimizer step ``number``."""
        return self.recipe.optim.lr * lr_factor(number, self.recipe.run.steps, self.recipe.optim)

    @property
    def grad_norm(self) -> Tensor | float | None:
        """Norm of the whole gradient of the last step, before clipping."""
        return self._grad_norm

    def _plain_grad_norm(self) -> Tensor | None:
        """At stage 0 in fp32 DeepSpeed wraps nothing and reports no norm."""
        if self.recipe.engine.zero_stage > 0 or self.recipe.engine.precision == "bf16":
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.student.parameters() if p.grad is not None])

    def full_fp32_parameters(self) -> dict[str, Tensor]:
        """Every parameter of the student, whole and in fp32 (the master, never a bf16 copy), on the CPU.

        A collective at stage 3 and in bf16: all ranks call it, one parameter is gathered at a time.
        """
        return {name: full_fp32(parameter).cpu() for name, parameter in self.student.named_parameters()}


def full_fp32(parameter: nn.Parameter) -> Tensor:
    """A parameter's whole fp32 master value; all ranks must call it together."""
    if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor | None = safe_get_full_fp32_param(parameter)
    assert value is not None, "DeepSpeed knows no fp32 master of this parameter"
    return value.detach().view(getattr(parameter, "ds_shape", parameter.shape))
