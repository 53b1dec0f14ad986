"""What an engine and a stored teacher must do, and a check of the order of calls that is right at every ZeRO stage.

To add an engine, write a class that follows `Engine` in a file of its own, and name it in `recipe/engines.py`.

Decision: docs/decisions/0020-engine-as-a-protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.recipe import Recipe


class StoredTeacher(Protocol):
    """A teacher that can also be saved and restored."""

    patch_px: int
    module: nn.Module
    """The segmenter that holds the average."""

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to logits (B, classes, h, w), without gradients."""

    def update(self, decay: float) -> None:
        """Move the teacher towards the student: T ← decay · T + (1 - decay) · S. All ranks call it together."""

    def full_state(self, *, keep: bool) -> dict[str, Tensor]:
        """Whole fp32 state on the CPU. All ranks call it together; those with ``keep=False`` get an empty dict."""

    def load_full_state(self, state: Mapping[str, Tensor]) -> None:
        """Put :meth:`full_state` back; all ranks call it together. A tensor may be read when it is asked for."""


class Engine(Protocol):
    """A module and its optimizer on every rank.

    For each micro-batch of a step call :meth:`forward` and then :meth:`backward`, once each. After the last one call
    :meth:`step`. Any other order raises a `RuntimeError` (:class:`StepOrder`).
    """

    name: str
    """Shown in logs, for example `ZeRO-1`."""
    recipe: Recipe
    student: nn.Module
    base_lr: float
    """Peak learning rate of the backbone."""
    grad_norm: Tensor | float | None
    """Norm of the whole gradient of the last step, before clipping."""
    skipped: bool
    """Whether the last step was not taken, because fp16 gradients overflowed."""

    def __init__(self, module: nn.Module, student: nn.Module, recipe: Recipe, runtime: Runtime) -> None:
        """Prepare a module for training.

        Args:
            module: called once for each micro-batch; its ``segmenter`` is the student whose parameters are optimised.
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

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The module's (loss, sums) for one micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch, divided by the number of micro-batches.

        After the last micro-batch they are averaged over ranks.
        """

    def leave_out(self) -> None:
        """Drop the forward that waits for its backward: this step is not taken."""

    def step(self, number: int) -> None:
        """Take optimizer step ``number`` (from 0) with its learning rate."""

    def lr(self, number: int) -> float:
        """Learning rate of the backbone (of its deepest layer) at optimizer step ``number``, from 0."""

    def full_fp32_parameters(self, *, keep: bool) -> dict[str, Tensor]:
        """The whole fp32 master of every parameter of the student, by name, on the CPU.

        It may be a collective, which gathers one parameter at a time. So all ranks call it together.

        Args:
            keep: whether this rank wants them. With False it takes part in the gathering and gets an empty dict.
        """

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

        Args:
            averages: fp32, whole on every rank, one for each of the student's parameters in their order. The engine may
                move their data to other memory.
        """

    def save(self, folder: Path) -> None:
        """Write all state that an exact continuation needs to ``folder``, which exists; all ranks call it together."""

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, bit for bit; all ranks call it together."""


class StepOrder:
    """Counts the calls of a step, and raises on an order that gives wrong results at some ZeRO stage.

    DeepSpeed accepts such orders without an error. Several backwards before one step are wrong at stages 1 and 2,
    several forwards before their backwards at stage 3 (docs/zero.md). They raise a `RuntimeError`.

    Args:
        micro_batches: number of micro-batches of one step.
    """

    def __init__(self, micro_batches: int) -> None:
        self._micro_batches = micro_batches
        self._backwards = 0
        self._waiting = False

    def forward(self) -> bool:
        """A forward begins. Returns whether it is the last of the step."""
        if self._waiting:
            raise RuntimeError("two forwards without a backward between them: silently wrong at ZeRO-3")
        if self._backwards == self._micro_batches:
            raise RuntimeError(f"more than engine.accumulation={self._micro_batches} micro-batches before a step")
        self._waiting = True
        return self._backwards + 1 == self._micro_batches

    def backward(self) -> bool:
        """A backward begins. Returns whether it is the last of the step."""
        if not self._waiting:
            raise RuntimeError("a backward without a forward of its own: silently wrong at ZeRO-1 and 2")
        self._waiting = False
        self._backwards += 1
        return self._backwards == self._micro_batches

    def step(self) -> None:
        """The step begins."""
        if self._waiting or self._backwards < self._micro_batches:
            raise RuntimeError(
                f"a step after {self._backwards} of {self._micro_batches} backwards: DeepSpeed would not take it"
            )
        self._backwards = 0

    def leave_out(self) -> None:
        """The step is not taken."""
        self._waiting = False
        self._backwards = 0
