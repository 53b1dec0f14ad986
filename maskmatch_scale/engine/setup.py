"""Where a rank runs: process group, device, threads. Works under the deepspeed launcher, torchrun, or alone."""

from __future__ import annotations

import atexit
import os
import socket
import warnings
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

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


def start(place: Place, threads: int | None) -> Runtime:
    """Set threads, choose the device and join the process group; a second run in one process finds it there.

    Args:
        place: of this rank.
        threads: CPU threads of this rank; None = the cores it may use, shared out among the ranks of the machine.
    """
    threads = threads or max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "MASTER_ADDR" not in os.environ:
        # Alone, without a launcher: DeepSpeed would look for MPI.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    _init_process_group(device)
    runtime = Runtime(place, device, threads)
    if dist.get_world_size() != place.world_size:
        raise RuntimeError(f"the process group has {dist.get_world_size()} ranks, the launcher said {place.world_size}")
    return runtime


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _init_process_group(device: torch.device) -> None:
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that torch has renamed: nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        # DeepSpeed compiles a shared-memory communicator at first use (a minute, and needs a compiler); gloo serves.
        compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
        if compatible is not None:
            compatible["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        # Left at exit, not at the end of a run: DeepSpeed keeps groups of its own for the life of the process, and a
        # second run in it would find them gone.
        atexit.register(_leave)
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
