"""What each rank of a job is: its host, process and GPU. The ranks tell each other when they have joined."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from maskmatch_scale.engine.processes import Process
from maskmatch_scale.errors import UserError

_LEAVING_S = 10.0
"""How long rank 0 waits for the others to read why the job is refused: its process holds what they read."""


@dataclass(frozen=True)
class Member:
    """One rank of the job."""

    host: str
    process: Process
    gpu: str | None
    """UUID of its GPU; None: it runs on the CPU."""

    @classmethod
    def here(cls, device: torch.device) -> Member:
        """This process, with the device that it has chosen."""
        return cls(socket.gethostname(), Process.own(), gpu_uuid(device))

    @classmethod
    def from_json(cls, text: str | bytes) -> Member:
        """Read what `json.dumps(asdict(member))` gives."""
        values = json.loads(text)
        return cls(**values | {"process": Process(**values["process"])})


def gpu_uuid(device: torch.device) -> str | None:
    """UUID of a GPU; None for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def connect(timeout_s: float) -> Store:
    """A connection of its own to the store of the rendezvous, at MASTER_ADDR and MASTER_PORT.

    The store is in rank 0's process, under torchrun in that of rank 0's agent. A connection serves one call at a time,
    and torch's own may be held by a call that waits.

    Args:
        timeout_s: how long it waits for something that nobody has written yet. If the store's process is stopped, a
            call never returns, whatever is set here.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )
    # torchrun's store outlives a restart of the ranks, and with it what they wrote before.
    return PrefixStore(f"maskmatch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def own_store(world_size: int, timeout_s: float) -> Store:
    """A store for one thread of this rank: a connection as :func:`connect` makes it, or for a single rank a local one.

    Args:
        world_size: number of ranks.
        timeout_s: see :func:`connect`.
    """
    return connect(timeout_s) if world_size > 1 else HashStore()


def meet(store: Store, rank: int, world_size: int, own: Member) -> tuple[Member, ...]:
    """Tell the other ranks what this one is, and read what they are; all ranks call it together.

    Raises:
        UserError: on every rank: two of them have the same GPU.
    """
    store.set(f"member/{rank}", json.dumps(asdict(own)))
    texts = store.multi_get([f"member/{other}" for other in range(world_size)])
    members = tuple(map(Member.from_json, texts))
    shared = shared_gpu(members)
    if shared is not None:
        error = UserError(shared)
        error.on_all_ranks = True
        store.set(f"read/{rank}", "")
        if rank == 0:
            with suppress(RuntimeError):  # a rank that has ended already has read them, or never will
                store.wait([f"read/{other}" for other in range(world_size)], timedelta(seconds=_LEAVING_S))
        raise error
    return members


def shared_gpu(members: Sequence[Member]) -> str | None:
    """What is wrong if two ranks have the same GPU, which NCCL would refuse later and in its own words; else None."""
    owners: dict[tuple[str, str], list[int]] = {}
    for rank, member in enumerate(members):
        if member.gpu is not None:
            owners.setdefault((member.host, member.gpu), []).append(rank)
    for (host, gpu), ranks in owners.items():
        if len(ranks) > 1:
            names = f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
            return (
                f"ranks {names} on {host} have the same GPU, {gpu}; start one rank for each GPU (--nproc-per-node, "
                "--num_gpus), or show them more GPUs (CUDA_VISIBLE_DEVICES)"
            )
    return None
