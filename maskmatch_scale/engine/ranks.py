"""A rank that has joined the process group: its device and its collectives."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.members import Member

_TEXT_BYTES = 4096


@dataclass
class Transfers:
    """What a backend has counted as collectives, though they were sends and receives between two ranks."""

    count: int = 0


_TRANSFERS = Transfers()
"""Of this process: its runs share process groups."""


@dataclass(frozen=True)
class Runtime:
    """A rank that has joined the process group."""

    place: Place
    device: torch.device
    threads: int
    members: tuple[Member, ...] = ()
    """What each rank of the job is; empty for a single one."""
    transfers: Transfers = field(default_factory=lambda: _TRANSFERS, compare=False)

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
        total = require_device(values, self.device).clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def max_over_ranks(self, value: int) -> Callable[[], int]:
        """Start to find the largest of the ranks' values; all ranks call it together, and none waits here.

        Args:
            value: of this rank.

        Returns:
            A function that gives the largest. It waits until the device has done what was launched before it was asked
            for, so call it when that is long past.
        """
        # Filled on the device: a copy of a number from the host would wait.
        largest = require_device(torch.full((1,), value, dtype=torch.int64, device=self.device), self.device)
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True) if self.world_size > 1 else None
        if self.device.type != "cuda":

            def wait() -> int:
                if work is not None:
                    work.wait()
                return int(largest)

            return wait
        if work is not None:
            work.wait()  # the stream waits, the host does not
        kept = torch.empty(1, dtype=torch.int64, pin_memory=True)
        kept.copy_(largest, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()

        def wait_on_gpu() -> int:
            copied.synchronize()
            return int(kept)

        return wait_on_gpu

    def text_of(self, rank: int, text: str) -> str:
        """The text of one rank, on every rank; all ranks call it together, and wait.

        Args:
            rank: whose.
            text: of this rank; UTF-8 beyond 4 kB is cut off.
        """
        if self.world_size == 1:
            return text
        letters = torch.zeros(_TEXT_BYTES, dtype=torch.int32)
        if rank == self.rank:
            own = text.encode()[:_TEXT_BYTES]
            letters[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8).int() if own else 0
        found = self.sum_over_ranks(letters.to(self.device)).cpu()
        return bytes(found[found > 0].tolist()).decode(errors="ignore")

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
        require_device(first, self.device), require_device(last, self.device)
        odd, alone = self.rank % 2 == 1, self.rank % 2 == 0 and self.rank == self.world_size - 1
        own = (first if odd else last).contiguous()
        got = torch.empty_like(own)
        peer = 0 if alone else self.rank - 1 if odd else self.rank + 1
        transfers = [dist.P2POp(dist.irecv, got, peer)]
        if not alone:
            transfers.append(dist.P2POp(dist.isend, own, peer))
        if self.rank == 0 and self.world_size % 2 == 1:
            transfers.append(dist.P2POp(dist.isend, first.contiguous(), self.world_size - 1))
        self._transfer(transfers)
        return got

    def swap(self, own: Tensor, peer: int) -> Tensor:
        """Exchange a tensor with one other rank, and wait for the device; both ranks call it together.

        Args:
            own: of this rank; of the same shape and dtype as the peer's.
            peer: the other rank.

        Returns:
            The peer's tensor.
        """
        got = torch.empty_like(require_device(own, self.device))
        self._transfer([dist.P2POp(dist.irecv, got, peer), dist.P2POp(dist.isend, own, peer)])
        self.wait_for_device()
        return got

    def wait_for_device(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _transfer(self, transfers: list[dist.P2POp]) -> None:
        group = dist.distributed_c10d._get_default_group()
        before: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        works = dist.batch_isend_irecv(transfers)
        # gloo counts each transfer, NCCL of some versions the batch, and not all ranks have as many.
        self.transfers.count += group._get_sequence_number_for_group() - before  # type: ignore[attr-defined]
        for work in works:
            work.wait()

    def collectives_called(self) -> dict[str, int]:
        """How many collectives this rank has called in each process group of all ranks; any thread may ask.

        A collective counts when it is called, not when it is done. Sends and receives do not count.
        """
        called: dict[str, int] = {}
        for group, name in list(dist.distributed_c10d._world.pg_names.items()):
            if group.size() == self.world_size:
                count: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
                called[str(name)] = count - (self.transfers.count if group == dist.group.WORLD else 0)
        return called

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


def require_device(values: Tensor, device: torch.device) -> Tensor:
    """Give a tensor back that is about to enter a collective; every collective of this package asks here.

    gloo takes tensors of the CPU, NCCL those of its GPU. On a machine without a GPU a tensor that was left on the CPU
    goes unnoticed, and with GPUs every job ends.

    Decision: docs/decisions/0036-collectives-ask-for-their-device.md.

    Raises:
        RuntimeError: it lies on another device.
    """
    if values.device.type != device.type:
        raise RuntimeError(f"a tensor on {values.device} in a collective of ranks on {device}: a bug in this package")
    return values


def group_device(group: Any) -> torch.device:
    """The kind of device whose tensors a process group takes."""
    return torch.device("cuda" if "nccl" in str(dist.get_backend(group)) else "cpu")


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
