"""A rank: which one it is, its device, and its collectives."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Place:
    """Which rank this is, as the launcher's environment says; known before any process group exists."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Place:
        """Read RANK, LOCAL_RANK, WORLD_SIZE, and LOCAL_WORLD_SIZE (torchrun) or LOCAL_SIZE (deepspeed)."""
        env = os.environ
        world_size = int(env.get("WORLD_SIZE", "1"))
        local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or str(world_size)
        return cls(int(env.get("RANK", "0")), int(env.get("LOCAL_RANK", "0")), world_size, int(local))


@dataclass(frozen=True)
class Runtime:
    """A rank that is up: its place, its device, its collectives."""

    place: Place
    device: torch.device
    threads: int

    @property
    def rank(self) -> int:
        """Number of this rank, 0 first."""
        return self.place.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.place.world_size

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """All-reduced copy."""
        total = values.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def of_neighbour(self, first: Tensor, last: Tensor) -> Tensor:
        """What the rank beside this one has: ranks 0 ↔ 1, 2 ↔ 3, … swap, an even rank its last, an odd one its first.

        With an odd number of ranks the last one gets rank 0's first. All ranks call it together.

        Args:
            first: of this rank's maps the first.
            last: and the last, of the same shape and dtype on every rank.
        """
        odd, alone = self.rank % 2 == 1, self.rank % 2 == 0 and self.rank == self.world_size - 1
        own = (first if odd else last).contiguous()
        got = torch.empty_like(own)
        peer = 0 if alone else self.rank - 1 if odd else self.rank + 1
        transfers = [dist.P2POp(dist.irecv, got, peer)]
        if not alone:
            transfers.append(dist.P2POp(dist.isend, own, peer))
        if self.rank == 0 and self.world_size % 2 == 1:
            transfers.append(dist.P2POp(dist.isend, first.contiguous(), self.world_size - 1))
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
        return got

    def stopwatch(self) -> Callable[[], Callable[[], float]]:
        """Start timing what this rank's device does; call the result to stop.

        Stopping gives a function for the seconds between. On a GPU ask it when the device has got so far, for example
        after reading a figure of the step: neither starting nor stopping waits for it.
        """
        if self.device.type != "cuda":
            began = time.perf_counter()

            def stop() -> Callable[[], float]:
                seconds = time.perf_counter() - began
                return lambda: seconds

            return stop
        first = _recorded_event()

        def stop_on_gpu() -> Callable[[], float]:
            last = _recorded_event()
            return lambda: first.elapsed_time(last) / 1000

        return stop_on_gpu

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
