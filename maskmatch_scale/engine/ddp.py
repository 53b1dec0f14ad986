"""The engine that uses accelerate: one process, or the whole model on every rank, with gradients averaged by DDP.

accelerate finds the process group, wraps the module, scales fp16 losses and writes checkpoints. It also keeps settings
for the life of a process (`AcceleratorState`, `GradientState`). Every run gives these the same values, so that a second
run in the same process may have another precision or accumulation. What depends on the recipe is done here instead:
autocast, the division by micro-batches, and the choice of the micro-batch whose backward communicates.

Decision: docs/decisions/0063-views-as-cuda-graphs.md.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, patch_environment
from torch import Tensor, nn

from maskmatch_scale.checkpoints.pieces import Piece, StoredState
from maskmatch_scale.engine.ema import ReplicatedTeacher, average_of
from maskmatch_scale.engine.optim import adamw, parameter_groups
from maskmatch_scale.engine.parts import (
    adamw_steps,
    buffer_pieces,
    part_pieces,
    restore_adamw,
    restore_buffers,
    restore_parts,
    whole_parts,
)
from maskmatch_scale.engine.precision import autocast, autocast_dtype
from maskmatch_scale.engine.protocol import StepOrder, StoredTeacher, leaves_out
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.engine.schedule import GroupSettings
from maskmatch_scale.errors import UserError
from maskmatch_scale.models.segmenter import Segmenter
from maskmatch_scale.models.units import visible_count
from maskmatch_scale.recipe import Recipe


class DdpEngine:
    """A module under accelerate (`protocol.Engine`).

    Args:
        module: called once for each view; its ``segmenter`` is the student whose parameters are optimised.
        student: that segmenter.
        recipe: sections engine, optim and run are read.
        runtime: this rank.

    Raises:
        UserError: accelerate sees other ranks or another device than this run, or this process has used it with other
            settings before.
    """

    every_gradient_first = False
    """DDP waits for every parameter in the backward pass that averages over ranks."""

    def __init__(self, module: nn.Module, student: nn.Module, recipe: Recipe, runtime: Runtime) -> None:
        self.name = "accelerate"
        self.recipe = recipe
        self.runtime = runtime
        self.student = student
        self.grad_norm: Tensor | float | None = None
        self.skipped = False
        self._device = runtime.device
        self._dtype = autocast_dtype(recipe)
        self._order = StepOrder()
        groups = parameter_groups(student, recipe.optim)
        self._groups = GroupSettings(groups, recipe, runtime.world_size)
        self.base_lr = self._groups.base_lr
        self._trained: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        optimizer = adamw(groups, self.base_lr, recipe.optim, runtime.device)
        self._accelerator = accelerator_of(runtime, find_unused=_leaves_unused(student, recipe))
        if recipe.engine.precision == "fp16":
            # accelerate makes a scaler only for its own mixed precision, which is not used (see `accelerator_of`).
            self._accelerator.scaler = torch.amp.GradScaler(runtime.device.type)
        # torch warns about SegFormer's depthwise weights (C, 1, 3, 3). Only the stride of the dimension of length 1
        # differs, which has no effect.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with warnings.catch_warnings():
            # torch has renamed `broadcast_buffers`, accelerate has not. Users can do nothing about it.
            warnings.simplefilter("ignore", FutureWarning)
            self._module = self._accelerator.prepare_model(module)
        self._optimizer = self._accelerator.prepare_optimizer(optimizer)
        if recipe.engine.cuda_graphs:  # they need gradients that keep their memory (`models/graphed.py`)
            for parameter in self._trained:
                parameter.grad = torch.zeros_like(parameter)

    @staticmethod
    def check_settings(recipe: Recipe, world_size: int) -> None:
        """See `Engine`: accelerate takes no settings apart from the recipe's."""

    def accumulate(self, *arguments: Any, last: bool) -> Tensor:
        """See `Engine`."""
        self._order.accumulate(last=last)
        # DDP decides in the forward whether its backward averages over ranks.
        with nullcontext() if last else self._accelerator.no_sync(self._module):
            with autocast(self._device, self._dtype):
                loss, figures = self._module(*arguments)
            self._accelerator.backward(loss)
        result: Tensor = figures.detach()
        return result

    def step(self, number: int) -> None:
        """See `Engine`."""
        self._order.step()
        self._groups.set_lr(self._optimizer.param_groups, number)
        for parameter in self._trained:
            if parameter.grad is None:
                # The step did not use it (the context decoder in burn-in). AdamW would skip a parameter without a
                # gradient, but DeepSpeed decays it and counts the step. A recipe means the same under both engines.
                parameter.grad = torch.zeros_like(parameter)
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.unscale_(self._optimizer.optimizer)
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        if self.recipe.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self._trained, self.recipe.optim.clip_norm, self.grad_norm)
        if self._accelerator.scaler is not None:
            self._optimizer.step()  # asks the scaler whether the gradients are finite
            self.skipped = self._accelerator.optimizer_step_was_skipped
        else:
            self.skipped = leaves_out(self.recipe) and not bool(self.grad_norm.isfinite())
            if not self.skipped:
                self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=not self.recipe.engine.cuda_graphs)

    def lr(self, number: int) -> float:
        """See `Engine`."""
        return self._groups.lr(number)

    def arithmetic(self) -> AbstractContextManager[None]:
        """See `Engine`."""
        return autocast(self._device, self._dtype)

    def store_teacher(self, average: nn.Module) -> StoredTeacher:
        """See `Engine`: the average is whole on every rank."""
        return ReplicatedTeacher(average, self)

    def averager(self, averages: Sequence[nn.Parameter]) -> Callable[[float], None]:
        """See `Engine`: every rank has all fp32 weights."""
        return average_of(averages, list(self.student.parameters()))

    def pieces(self) -> Iterator[Piece]:
        """See `Engine`: every rank has everything, and gives its share."""
        parts = whole_parts(self.student.named_parameters(), self.runtime.rank, self.runtime.world_size)
        yield from part_pieces("student", parts, self._optimizer.state)
        yield from buffer_pieces("student", self.student, self.recipe, self.runtime)

    def progress(self) -> dict[str, Any]:
        """See `Engine`; the scaler counts the steps since the scale last changed."""
        found: dict[str, Any] = {"optimizer_step": adamw_steps(self._optimizer)}
        if self._accelerator.scaler is not None:
            state = self._accelerator.scaler.state_dict()
            found["loss_scaler"] = {"scale": state["scale"], "growth_tracker": state["_growth_tracker"]}
        return found

    def restore(self, stored: StoredState, progress: Mapping[str, Any]) -> None:
        """See `Engine`."""
        parts = list(whole_parts(self.student.named_parameters()))
        restore_parts("student", parts, stored)
        restore_adamw(self._optimizer, parts, stored, progress["optimizer_step"])
        restore_buffers("student", self.student, stored, self.recipe, self.runtime)
        scaler, scale = self._accelerator.scaler, progress.get("loss_scaler")
        if scaler is not None and scale:
            tracker = scale.get("growth_tracker", 0)  # 0 after another library's scaler
            scaler.load_state_dict(scaler.state_dict() | {"scale": scale["scale"], "_growth_tracker": tracker})


def _leaves_unused(student: nn.Module, recipe: Recipe) -> bool:
    """Whether some step gives the context decoder no gradients, because nothing is masked in it."""
    if getattr(student, "context", None) is None:
        return False
    if recipe.burn_in_steps > 0 or not recipe.method.dropped:
        return True
    assert isinstance(student, Segmenter)
    rows, cols = grid = student.unit_grid(*recipe.data.crop_px)
    return all(visible_count(grid, keep) == rows * cols for keep in recipe.method.dropped.values())


def accelerator_of(runtime: Runtime, *, find_unused: bool = False) -> Accelerator:
    """An `Accelerator` on the process group of :func:`maskmatch_scale.engine.setup.start`.

    It would read its settings from the environment or a configuration file, which may contradict this run or be
    missing. So they are passed here. Its mixed precision is never used, because the first setting in a process stays
    for all later runs.

    Args:
        runtime: this rank.
        find_unused: whether DDP looks for parameters that a step does not use. In every step this costs a walk through
            the graph and a sum over ranks of one number for each parameter. Without it DDP raises an error in the step
            that follows one with unused parameters.

    Raises:
        UserError: accelerate sees other ranks or another device than ``runtime``, its launcher asks for another engine,
            or this process already has an `Accelerator` of another kind.
    """
    other = [name for name in _OTHER_ENGINES if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"]
    if other:
        raise UserError(f"engine.library=accelerate: its launcher asks for {other[0]}; {_REMEDY}")
    place, device, alone = runtime.place, runtime.device, runtime.world_size == 1
    # accelerate changes these variables, and sets the number of threads if OMP_NUM_THREADS is missing.
    environment = {
        "RANK": place.rank,
        "LOCAL_RANK": -1 if alone else place.local_rank,  # -1: no launcher, and no DDP around a single rank
        "WORLD_SIZE": place.world_size,
        "LOCAL_WORLD_SIZE": place.local_world_size,
        "OMP_NUM_THREADS": runtime.threads,
    }
    ddp = DistributedDataParallelKwargs(
        # BatchNorm's statistics are each rank's own, or synchronised already. They must not be replaced by rank 0's.
        broadcast_buffers=False,
        find_unused_parameters=find_unused,
        gradient_as_bucket_view=True,
    )
    with patch_environment(**environment):
        try:
            accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision="no",
                dynamo_backend="no",
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                kwargs_handlers=[ddp],
            )
        except ValueError as error:
            raise UserError(f"engine.library=accelerate: {error} To solve this: {_REMEDY}") from None
    kind = DistributedType.MULTI_GPU if device.type == "cuda" else DistributedType.MULTI_CPU
    kinds = (kind, DistributedType.NO) if alone else (kind,)
    seen = (accelerator.num_processes, accelerator.process_index, accelerator.device.type)
    if seen != (runtime.world_size, runtime.rank, device.type) or accelerator.distributed_type not in kinds:
        raise UserError(
            f"engine.library=accelerate: it sees rank {seen[1]} of {seen[0]} on {seen[2]} "
            f"({accelerator.distributed_type.value}), this run is rank {runtime.rank} of {runtime.world_size} on "
            f"{device.type} ({' or '.join(k.value for k in kinds)}); {_REMEDY}"
        )
    return accelerator


_OTHER_ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM")
_REMEDY = (
    "start it with launch/accelerate.sh or torchrun (launch/README.md), without DeepSpeed or FSDP in accelerate's own "
    "configuration, and do not make an Accelerator of your own in this process before"
)
