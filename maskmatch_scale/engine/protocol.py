"""What training needs of an engine and of a stored teacher, and the order of calls that is right at every ZeRO stage.

To add an engine, write a class of this protocol in a file of its own, and name it in `recipe/engines.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        """Normalised images (B, 3, H, W) to logits, without gradients."""

    def update(self, decay: float) -> None:
        """T ← decay · T + (1 - decay) · S."""

    def full_state(self, *, keep: bool) -> dict[str, Tensor]:
        """Whole fp32 state on the CPU; all ranks call it together, those with ``keep=False`` get an empty dict."""

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Put :meth:`full_state` back; all ranks call it together."""


class Engine(Protocol):
    """A module and its optimizer on every rank.

    For each micro-batch of a step call :meth:`forward` and then :meth:`backward`, once each; :meth:`step` after the
    last. Any other order raises.
    """

    name: str
    """For people, such as `ZeRO-1`."""
    recipe: Recipe
    student: nn.Module
    base_lr: float
    """Peak learning rate of the backbone."""
    grad_norm: Tensor | float | None
    """Norm of the whole gradient of the last step, before clipping."""
    skipped: bool
    """Whether the last step was not taken, because fp16 gradients overflowed."""

    def __init__(self, module: nn.Module, student: nn.Module, recipe: Recipe, runtime: Runtime) -> None:
        """Take the module over.

        Args:
            module: called once a micro-batch; its ``segmenter`` is the student whose parameters are optimised.
            student: that segmenter.
            recipe: of the run.
            runtime: this rank.
        """

    @staticmethod
    def check_settings(recipe: Recipe, world_size: int) -> None:
        """Look for mistakes in settings of the engine's own library, before anything is built or written.

        Raises:
            UserError: names the file and its key.
        """

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The module's (loss, sums) for one micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, divided by the number of micro-batches; averaged over ranks after the last."""

    def leave_out(self) -> None:
        """Forget the forward that waits for its backward: this step is not taken."""

    def step(self, number: int) -> None:
        """Set the learning rate of optimizer step ``number`` (from 0) and take it."""

    def lr(self, number: int) -> float:
        """Learning rate of the backbone (of its deepest layer) at optimizer step ``number``."""

    def full_fp32_parameters(self, *, keep: bool) -> dict[str, Tensor]:
        """Every parameter of the student, whole, in fp32 (the master, never a 16-bit copy), on the CPU.

        May be a collective: all ranks call it, one parameter is gathered at a time.

        Args:
            keep: whether this rank wants them; False: it helps to gather, and gets an empty dict.
        """

    def arithmetic(self) -> AbstractContextManager[None]:
        """The arithmetic of a step for forwards of the student outside a step, such as an evaluation's."""

    def store_teacher(self, average: nn.Module) -> StoredTeacher:
        """Keep an average of the student where this engine keeps it best.

        Args:
            average: a copy of the student in eval mode, fp32, in host memory.
        """

    def averager(self, averages: Sequence[nn.Parameter]) -> Callable[[float], None]:
        """A function that moves whole averages towards the student's fp32 masters; all ranks call it together.

        The function takes the decay: average ← decay · average + (1 - decay) · master.

        Args:
            averages: fp32, whole on every rank, one for each of the student's parameters in their order. They may be
                moved to other memory.
        """

    def save(self, folder: Path) -> None:
        """Write what it needs to go on exactly into ``folder``, which exists; all ranks call it together."""

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, bit for bit; all ranks call it together."""


class StepOrder:
    """Counts the calls of a step and raises on an order that some ZeRO stage would take without a word.

    Several backwards before one step are wrong at stages 1 and 2, several forwards before their backwards at stage 3
    (docs/zero.md).

    Args:
        micro_batches: of one step.
    """

    def __init__(self, micro_batches: int) -> None:
        self._micro_batches = micro_batches
        self._gone_back = 0
        self._waiting = False

    def forward(self) -> bool:
        """One forward begins; returns whether it is the step's last."""
        if self._waiting:
            raise RuntimeError("two forwards without a backward between them: silently wrong at ZeRO-3")
        if self._gone_back == self._micro_batches:
            raise RuntimeError(f"more than engine.accumulation={self._micro_batches} micro-batches before a step")
        self._waiting = True
        return self._gone_back + 1 == self._micro_batches

    def backward(self) -> bool:
        """One backward begins; returns whether it is the step's last."""
        if not self._waiting:
            raise RuntimeError("a backward without a forward of its own: silently wrong at ZeRO-1 and 2")
        self._waiting = False
        self._gone_back += 1
        return self._gone_back == self._micro_batches

    def step(self) -> None:
        """The step begins."""
        if self._waiting or self._gone_back < self._micro_batches:
            raise RuntimeError(
                f"a step after {self._gone_back} of {self._micro_batches} backwards: DeepSpeed would not take it"
            )
        self._gone_back = 0

    def leave_out(self) -> None:
        """The step is not taken."""
        self._waiting = False
        self._gone_back = 0
