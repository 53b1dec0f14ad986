"""What a rank holds of a model's state, given as pieces and filled from a checkpoint, one tensor at a time.

A tensor that every rank has whole is shared out: of N ranks rank r gives elements r · ceil(n / N) to (r + 1) ·
ceil(n / N), as ZeRO-3 cuts it. A tensor that is cut already is given as it is cut, so nothing is sent. A part is the
memory in which a step changes the values; nothing is copied here.

Decision: docs/decisions/0043-state-as-parts.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskmatch_scale.checkpoints.pieces import Piece, StoredState
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by the names that torch gives them."""


@dataclass(frozen=True)
class Part:
    """Neighbouring elements of a parameter that this rank holds, or gives."""

    name: str
    """Of the parameter, in the model's `state_dict`."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Place of the first element in the flattened parameter."""
    values: Tensor
    """(n,): fp32 masters; a frozen parameter's weights in their dtype. A view of the memory that a step uses."""
    owner: Tensor | None = None
    """The tensor under which the optimizer keeps its state; None: the parameter is not trained."""
    offset: int = 0
    """Place of the first element in the flattened ``owner``."""


def whole_parts(parameters: Iterable[tuple[str, nn.Parameter]], rank: int = 0, ranks: int = 1) -> Iterator[Part]:
    """Parts of parameters that every rank has whole: those that ``rank`` gives; with one rank, the whole parameters."""
    for name, parameter in parameters:
        size = -(-parameter.numel() // ranks)
        start = min(size * rank, parameter.numel())
        values = parameter.detach().view(-1)[start : start + size]
        owner = parameter if parameter.requires_grad else None
        yield Part(name, tuple(parameter.shape), start, values, owner, start)


def part_pieces(kind: str, parts: Iterable[Part], state: Mapping[Tensor, Any] | None = None) -> Iterator[Piece]:
    """The pieces of parts: `KIND/N` in fp32, and AdamW's moments of those that it has stepped.

    Args:
        kind: `student` or `ema`.
        parts: of this rank; empty ones give nothing.
        state: AdamW's state of each owner.
    """
    for part in parts:
        if not part.values.numel():
            continue
        yield Piece(f"{kind}/{part.name}", part.shape, part.start, part.values.float())
        moments = {} if state is None or part.owner is None else state.get(part.owner, {})
        for moment in MOMENTS:
            if moment in moments:
                values = moments[moment].view(-1)[part.offset : part.offset + part.values.numel()]
                yield Piece(f"{moment}/{part.name}", part.shape, part.start, values)


@torch.no_grad()
def restore_parts(kind: str, parts: Iterable[Part], stored: StoredState) -> None:
    """Fill parts from the tensors `KIND/N`; only their own elements are read.

    Raises:
        KeyError: a tensor is not stored.
        ValueError: its shape is another one.
    """
    for part in parts:
        if part.values.numel():
            part.values.copy_(_read(stored, f"{kind}/{part.name}", part))


@torch.no_grad()
def restore_adamw(optimizer: Any, parts: Iterable[Part], stored: StoredState, step: int) -> None:
    """Give AdamW the stored moments, and the number of steps that it has taken.

    Args:
        optimizer: torch's AdamW, or what DeepSpeed wraps around it.
        parts: whose owners it steps.
        stored: moments that are missing in it are zero: those of a parameter that was frozen.
        step: 0: the optimizer has not stepped, and has no state yet.

    Raises:
        ValueError: the shape of a moment is not that of its parameter.
    """
    optimizer.state.clear()
    if step == 0:
        return
    settings, names = optimizer.param_groups[0], set(stored.names())
    for part in parts:
        if part.owner is None:
            continue
        state = optimizer.state[part.owner]
        if not state:
            # As torch makes it at the first step: on the device only for one kernel that steps many parameters.
            device = part.owner.device if settings.get("fused") or settings.get("capturable") else torch.device("cpu")
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(part.owner, memory_format=torch.preserve_format)
        for moment in MOMENTS:
            if part.values.numel() and f"{moment}/{part.name}" in names:
                values = state[moment].view(-1)[part.offset : part.offset + part.values.numel()]
                values.copy_(_read(stored, f"{moment}/{part.name}", part))


def adamw_steps(optimizer: Any) -> int:
    """How many steps AdamW has taken. All parameters count alike: in each step every one of them has a gradient."""
    first: dict[str, Any] = next(iter(optimizer.state.values()), {})
    return int(first.get("step", 0))


def buffer_pieces(kind: str, module: nn.Module, recipe: Recipe, runtime: Runtime) -> Iterator[Piece]:
    """The buffers in a module's `state_dict`: rank 0 gives `KIND/N`.

    With `model.batchnorm: per_rank` every rank R of several also gives its own, as `rank-R/KIND/N`. Evaluation and
    export take `KIND/N`.
    """
    per_rank = recipe.model.batchnorm == "per_rank" and runtime.world_size > 1
    for name, buffer in _persistent(module):
        values = buffer.detach().reshape(-1)
        if runtime.rank == 0:
            yield Piece(f"{kind}/{name}", tuple(buffer.shape), 0, values)
        if per_rank:
            yield Piece(f"rank-{runtime.rank}/{kind}/{name}", tuple(buffer.shape), 0, values)


@torch.no_grad()
def restore_buffers(kind: str, module: nn.Module, stored: StoredState, recipe: Recipe, runtime: Runtime) -> None:
    """Fill the buffers in a module's `state_dict`.

    With `model.batchnorm: per_rank` rank r takes those of rank r mod N, if N ranks have stored their own.

    Raises:
        KeyError: a buffer is not stored.
        ValueError: its shape is another one.
    """
    ranks = len({name.partition("/")[0] for name in stored.names() if name.startswith("rank-")})
    per_rank = recipe.model.batchnorm == "per_rank" and ranks > 0
    prefix = f"rank-{runtime.rank % ranks}/" if per_rank else ""
    for name, buffer in _persistent(module):
        whole = Part(name, tuple(buffer.shape), 0, buffer.detach().view(-1))
        whole.values.copy_(_read(stored, f"{prefix}{kind}/{name}", whole))


def _persistent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names = module.state_dict().keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in names)


def _read(stored: StoredState, name: str, part: Part) -> Tensor:
    shape = tuple(stored.shape(name))
    if shape != part.shape:
        raise ValueError(f"{name} has shape {shape} in the checkpoint, and {part.shape} in this model")
    return stored.read(name, part.start, part.start + part.values.numel())
