"""How fast ranks and hosts reach each other, and whether their clocks agree; measured in a second or two at the start.

Hosts exchange data in pairs, in up to three rounds with another partner each time. A host whose own link is slow is
slow with every partner, and a partner of it has been faster with somebody else: so the host is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.hosts.compare import Finding, compare_clocks

_LEAST, _MOST_ON_CPU, _MOST_ON_GPU = 1 << 18, 1 << 24, 1 << 27
"""Bytes that are sent: few enough for a slow link, and as many as fit into the time."""
_MEASURED_S = 0.2
"""How long one measurement may take."""
_ROUNDS = 3
_SLOW = 0.5
"""A host whose link has less than this share of the others' median is worth a warning."""


@dataclass(frozen=True)
class Links:
    """What was measured, the same on all ranks. Rates are in bytes/s."""

    ranks: int
    all_reduce: float
    """Of all ranks: 2 (n - 1) / n times the bytes of the tensor, by the time. That is what each rank sends."""
    hosts: Mapping[str, float]
    """Of each host that has a partner, each way at the same time, with the fastest of its partners; by its label."""
    clocks: Mapping[str, float]
    """Seconds since 1970 by the clock of each host, at about the same moment."""

    def line(self) -> str:
        """For the log."""
        text = f"links: all-reduce over {self.ranks} ranks {_rate(self.all_reduce)}"
        if not self.hosts:
            return text
        text += f"; a pair of hosts {_rate(median(self.hosts.values()))} each way"
        if len(self.hosts) == 2:
            return text
        slowest = min(self.hosts, key=lambda label: self.hosts[label])
        return f"{text}, the slowest host {_rate(self.hosts[slowest])}: {slowest}"

    def findings(self) -> list[Finding]:
        """Lines on hosts whose link is slow, or whose clock is off."""
        found = compare_clocks(self.clocks) if len(self.clocks) > 1 else []
        if len(self.hosts) > 2:
            usual = median(self.hosts.values())
            found += [
                Finding(
                    f"the link of {label} is slow: {_rate(rate)} with each of its partners, elsewhere {_rate(usual)}; "
                    "look at its cable and port, and at which interface it uses (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, "
                    "GLOO_SOCKET_IFNAME)",
                    False,
                )
                for label, rate in self.hosts.items()
                if rate < _SLOW * usual
            ]
        return found


def measure(runtime: Runtime) -> Links:
    """Measure the links between the ranks of a job; all ranks call it together.

    Nothing random is drawn, and no state of a run is touched.
    """
    world = runtime.world_size
    leads = torch.zeros(world, dtype=torch.int64, device=runtime.device)
    leads[runtime.rank] = runtime.place.local_rank == 0
    leaders: list[int] = runtime.sum_over_ranks(leads).nonzero().flatten().tolist()
    clocks = _told(runtime, time.time())  # read when all ranks have just left the same collective
    labels = {leader: label_of(runtime, leaders, leader) for leader in leaders}

    def all_reduce(tensor: Tensor) -> None:
        runtime.sum_over_ranks(tensor)
        runtime.wait_for_device()

    size = _fitting(runtime, all_reduce)
    slowest = max(_told(runtime, _seconds(runtime, all_reduce, size)))
    reduced = 2 * (world - 1) / world * size / slowest
    rates: dict[str, float] = {}
    for pairs in pairings(leaders, _ROUNDS):
        peer = {one: other for pair in pairs for one, other in (pair, pair[::-1])}.get(runtime.rank)

        def swap(tensor: Tensor, peer: int | None = peer) -> None:
            if peer is not None:
                runtime.swap(tensor, peer)

        size = _fitting(runtime, swap)
        taken = _told(runtime, _seconds(runtime, swap, size))
        for one, other in pairs:
            rate = size / max(taken[one], taken[other])
            for label in (labels[one], labels[other]):
                rates[label] = max(rates.get(label, 0.0), rate)
    return Links(world, reduced, rates, {labels[leader]: clocks[leader] for leader in leaders})


def pairings(leaders: Sequence[int], most: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each host has one partner, and another one in every round; of an odd number one rests.

    Args:
        leaders: a rank of each host.
        most: number of rounds, if there are as many.
    """
    if len(leaders) < 2:
        return []
    places: list[int | None] = [*leaders, *([None] if len(leaders) % 2 else [])]
    rounds = []
    for _ in range(min(most, len(places) - 1)):
        half = len(places) // 2
        sides = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(one, other) for one, other in sides if one is not None and other is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def label_of(runtime: Runtime, leaders: Sequence[int], leader: int) -> str:
    """How messages name a host: its name and its ranks.

    Args:
        runtime: knows the hosts of all ranks.
        leaders: the first rank of each host.
        leader: that of this host.
    """
    later = [other for other in leaders if other > leader]
    last = min(later, default=runtime.world_size) - 1
    return named(runtime.members[leader].host, leader, last)


def named(host: str, first: int, last: int) -> str:
    """A host and its ranks in words."""
    return f"{host} (rank {first})" if first == last else f"{host} (ranks {first}-{last})"


def _told(runtime: Runtime, value: float) -> list[float]:
    """A number of each rank."""
    values = torch.zeros(runtime.world_size, dtype=torch.float64, device=runtime.device)
    values[runtime.rank] = value
    told: list[float] = runtime.sum_over_ranks(values).tolist()
    return told


def _fitting(runtime: Runtime, exchange: Callable[[Tensor], None]) -> int:
    """Bytes for which an exchange takes about as long as it may, on the slowest rank."""
    _seconds(runtime, exchange, _LEAST)  # connections are made at first use
    slowest = max(_told(runtime, _seconds(runtime, exchange, _LEAST)))
    most = _MOST_ON_GPU if runtime.device.type == "cuda" else _MOST_ON_CPU
    return max(_LEAST, min(most, int(_LEAST * _MEASURED_S / max(slowest, 1e-6)))) // 4 * 4


def _seconds(runtime: Runtime, exchange: Callable[[Tensor], None], size: int) -> float:
    tensor = torch.zeros(size // 4, dtype=torch.float32, device=runtime.device)
    runtime.wait_for_device()
    began = time.perf_counter()
    exchange(tensor)
    return time.perf_counter() - began


def _rate(rate: float) -> str:
    """`11.2 GB/s`, or `31 MB/s`."""
    return f"{rate / 1e9:.3g} GB/s" if rate >= 1e9 else f"{rate / 1e6:.3g} MB/s"
