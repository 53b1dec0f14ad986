"""Made-up states, cut into pieces in any way, and checkpoints of them that one process writes for several ranks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import HashStore

from maskmatch_scale.checkpoints import writing
from maskmatch_scale.checkpoints.pieces import Piece
from maskmatch_scale.checkpoints.writing import CheckpointWriter, Outcome

STATE = {
    "student/backbone.weight": torch.arange(24, dtype=torch.float32).view(4, 6),
    "student/head.bias": torch.tensor([1.5, -2.0, 3.25]).bfloat16(),
    "student/head.batches": torch.tensor(7),
    "ema/backbone.weight": torch.arange(24, dtype=torch.float32).view(4, 6) / 2,
    "ema/head.bias": torch.tensor([0.5, -1.0, 2.25]),
    "ema/nothing": torch.empty(0, 3),
}
SETTINGS = {"world_size": 1, "global_batch": 4, "precision": "fp32"}


def cut(state: dict[str, torch.Tensor], cuts: dict[str, list[int]], ranks: int) -> list[list[Piece]]:
    """The pieces of each rank: a tensor is cut at some places, and its pieces are dealt to the ranks in turn."""
    dealt: list[list[Piece]] = [[] for _ in range(ranks)]
    number = 0
    for name, value in state.items():
        edges = [0, *sorted(cuts.get(name, [])), value.numel()]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            dealt[number % ranks].append(Piece(name, tuple(value.shape), start, value.flatten()[start:stop]))
            number += 1
    return dealt


def write(
    folder: Path,
    step: int = 4,
    pieces: list[list[Piece]] | None = None,
    timeout_s: float = 30.0,
    own_streams: Sequence[dict[str, int] | None] = (),
    **options: object,
) -> Outcome:
    """Write a checkpoint as the ranks of a job do, with a thread for each; gives the outcome, the same on all."""
    dealt = cut(STATE, {}, 1) if pieces is None else pieces
    store, outcomes = HashStore(), {}
    number = next(writing._NUMBERS)

    def one(rank: int) -> None:
        writer = CheckpointWriter(folder, rank, len(dealt), store, timeout_s, **(options if rank == 0 else {}))
        own = own_streams[rank] if own_streams else None
        writer.save(step, dealt[rank], SETTINGS | {"world_size": len(dealt)}, {"format": 1, "step": step}, own)
        outcomes[rank] = writer.wait()

    # The ranks of a job count their checkpoints alike; here they share a process.
    counted = writing._NUMBERS
    writing._NUMBERS = iter([number] * len(dealt))  # type: ignore[assignment]
    try:
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(dealt))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        writing._NUMBERS = counted
    assert len({(outcome.error, outcome.bytes) for outcome in outcomes.values()}) == 1
    result: Outcome = outcomes[0]
    return result


def read_all(stored: object) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint in its shape."""
    return {name: stored.read(name).view(stored.shape(name)) for name in stored.names()}  # type: ignore[attr-defined]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one
    )
