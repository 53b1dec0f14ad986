"""A rank of a job: its number, its device, and its collectives."""

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
    """A rank that has joined the process group."""

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
        """A copy of ``values``, summed over all ranks; all ranks call it together."""
        total = values.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def of_neighbour(self, first: Tensor, last: Tensor) -> Tensor:
        """Exchange a tensor with the neighbouring rank; all ranks call it together.

        Ranks 0 and 1, 2 and 3, … exchange: the even rank sends ``last``, the odd one ``first``. With an odd number of
        ranks the last rank has no partner, and gets the ``first`` of rank 0.

        Args:
            first: the first of this rank's tensors.
            last: the last of them, of the same shape and dtype as ``first`` and on every rank.

        Returns:
            The neighbour's tensor.
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
        """Start measuring the time of work on this rank's device.

        Returns:
            A function that stops the measurement. It returns a function that gives the seconds in between. On a GPU
            call that one only when the device has done the work, for example after a figure of the step was read:
            neither starting nor stopping waits for the device.
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
