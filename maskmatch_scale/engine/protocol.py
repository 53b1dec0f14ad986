"""What an engine and a stored teacher must do, and a check of the order of calls that is right at every ZeRO stage.

To add an engine, write a class that follows `Engine` in a file of its own, and name it in `recipe/engines.py`.

Decision: docs/decisions/0020-engine-as-a-protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from maskmatch_scale.checkpoints.pieces import Piece, StoredState
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.recipe import Recipe


class StoredTeacher(Protocol):
    """A teacher that can also be saved and restored."""

    patch_px: int
    module: nn.Module
    """The segmenter that holds the average."""

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to logits (B, classes, h, w), without gradients."""

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which sharded weights are gathered once for all forwards; all ranks enter and leave it together.

        The teacher must not be updated in it.
        """

    def update(self, decay: float) -> None:
        """Move the teacher towards the student: T ← decay · T + (1 - decay) · S. All ranks call it together."""

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of the average: `ema/N`, and its buffers as `Engine.pieces` gives the student's."""

    def restore(self, stored: StoredState) -> None:
        """Take the average that :meth:`pieces` of any number of ranks gave; all ranks call it together.

        Raises:
            KeyError: a tensor is not stored.
            ValueError: its shape is another one.
        """


class Engine(Protocol):
    """A module and its optimizer on every rank.

    For each view of each micro-batch call :meth:`accumulate`. After the last one call :meth:`step`. Any other order
    raises a `RuntimeError` (:class:`StepOrder`).
    """

    name: str
    """Shown in logs, for example `ZeRO-1`."""
    recipe: Recipe
    runtime: Runtime
    student: nn.Module
    base_lr: float
    """Peak learning rate of the backbone."""
    grad_norm: Tensor | float | None
    """Norm of the whole gradient of the last step, before clipping."""
    every_gradient_first: bool
    """Which backward pass of a step must reach every parameter that the others reach: its first, or else its last."""
    skipped: bool
    """Whether the last step was not taken, because its gradients were not finite. Then nothing is left of them.

    It is False where nobody asked for leaving steps out (`leaves_out`): such a step ends the run.
    """

    def __init__(self, module: nn.Module, student: nn.Module, recipe: Recipe, runtime: Runtime) -> None:
        """Prepare a module for training.

        Args:
            module: returns a loss and figures; its ``segmenter`` is the student whose parameters are optimised.
            student: that segmenter.
            recipe: of the run.
            runtime: this rank.
        """

    @staticmethod
    def check_settings(recipe: Recipe, world_size: int) -> None:
        """Check the settings of the engine's own library, before anything is built or written.

        Raises:
            UserError: names the file and its key.
        """

    def accumulate(self, *arguments: Any, last: bool) -> Tensor:
        """One forward of the module and the backward of its loss, whose gradients are added to those of the step.

        Args:
            arguments: of the module.
            last: whether this is the last call before :meth:`step`. After it the gradients are averaged over ranks.

        Returns:
            The module's figures, without a graph.
        """

    def step(self, number: int) -> None:
        """Take optimizer step ``number`` (from 0) with its learning rate."""

    def lr(self, number: int) -> float:
        """Learning rate of the backbone (of its deepest layer) at optimizer step ``number``, from 0."""

    def arithmetic(self) -> AbstractContextManager[None]:
        """A context in which forwards of the student outside a step (an evaluation) have the precision of a step."""

    def store_teacher(self, average: nn.Module) -> StoredTeacher:
        """Make a stored teacher, placed as it suits this engine.

        Args:
            average: a copy of the student in eval mode, fp32, in host memory.
        """

    def averager(self, averages: Sequence[nn.Parameter]) -> Callable[[float], None]:
        """Make a function that moves whole averages towards the student's fp32 masters.

        The function takes the decay: average ← decay · average + (1 - decay) · master. All ranks call it together.
        Averages of frozen parameters are left as they are.

        Args:
            averages: fp32, whole on every rank, one for each of the student's parameters in their order. The engine may
                move their data to other memory.
        """

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of the student and its optimizer, one tensor at a time; all ranks call it together.

        The pieces of all ranks have every element of every tensor once: `student/N`, the fp32 masters of trained
        parameters and the weights of frozen ones; `exp_avg/N` and `exp_avg_sq/N`, the moments of trained ones, once the
        optimizer has stepped; `student/N`, buffers in the `state_dict`, as rank 0 has them. With
        `model.batchnorm: per_rank` each rank R of several gives its own as `rank-R/student/N` too.

        Values may be the memory of the state itself: copy them before the next step.
        """

    def progress(self) -> dict[str, Any]:
        """What an exact continuation needs besides :meth:`pieces`, the same on every rank, as JSON values.

        `optimizer_step`: steps that AdamW has taken, without those left out; `loss_scaler`: in fp16, its `scale`, and
        counters of the library that has it.
        """

    def restore(self, stored: StoredState, progress: Mapping[str, Any]) -> None:
        """Take what :meth:`pieces` and :meth:`progress` gave, in a new engine; all ranks call it together.

        Number of ranks, ZeRO stage, engine and precision may be others than those of the engine that gave it: masters,
        moments and number of steps are the same. 16-bit weights are made from the masters. One parameter is read at a
        time, and of it what this rank holds.

        A parameter without stored moments (it was frozen) starts with moments of zero. Buffers of ranks are taken by
        rank r from rank r mod their number.

        Raises:
            KeyError: a parameter or buffer is not stored.
            ValueError: its shape is another one.
        """


class StepOrder:
    """Raises a `RuntimeError` if a step does not end with the one call of `accumulate` that is its last.

    DeepSpeed accepts other orders without an error: it would step with gradients that were not averaged over ranks, or
    not step at all (docs/zero.md).
    """

    def __init__(self) -> None:
        self._complete = False

    def accumulate(self, *, last: bool) -> None:
        """A forward and its backward begin."""
        if self._complete:
            raise RuntimeError("gradients after the last of this step: they would not be averaged over ranks")
        self._complete = last

    def step(self) -> None:
        """The step begins."""
        if not self._complete:
            raise RuntimeError("a step before its last gradients: they are not averaged over ranks yet")
        self._complete = False


def leaves_out(recipe: Recipe) -> bool:
    """Whether a step with non-finite gradients is left out.

    fp16 gradients overflow now and then, and the loss scale falls. In other precisions a recipe asks for it.
    """
    return recipe.engine.precision == "fp16" or recipe.run.max_nonfinite_steps > 0
