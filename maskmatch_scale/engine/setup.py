"""Where a rank runs: process group, device, threads. Works under the deepspeed launcher, torchrun, accelerate, or
alone.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist

from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import EngineRecipe, Recipe

Precision = Literal["fp32", "bf16", "fp16", "autocast-bf16"]


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


def import_deepspeed() -> Any:
    """The module `deepspeed`, told what machine this is and to keep its remarks to itself."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that torch has renamed: nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


def choose_precision(recipe: Recipe, *, batchnorm: bool) -> tuple[Precision, str]:
    """The precision of a run on this machine, and why; called before any process group exists.

    Args:
        recipe: its `engine` section is read.
        batchnorm: whether the model has a BatchNorm.

    Raises:
        UserError: the machine or the model cannot do what the recipe asks for; says what can be done.
    """
    engine, wanted = recipe.engine, recipe.engine.precision
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    has_bf16 = gpu is None or torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        if gpu is None:
            return "fp32", "engine.precision=auto, and there is no GPU"
        if not has_bf16:
            return "fp32", f"engine.precision=auto, and a {gpu} has no bf16 arithmetic"
        if batchnorm:
            return "autocast-bf16", "engine.precision=auto, and this model's BatchNorm rules out bf16 weights"
        if engine.zero_stage == 0:
            return "autocast-bf16", "engine.precision=auto, and engine.zero_stage=0 rules out bf16 weights"
        return "bf16", "engine.precision=auto, and nothing speaks against bf16 weights with fp32 masters"
    if wanted == "fp16" and gpu is None:
        raise UserError(
            "engine.precision=fp16: it needs a GPU, and this machine has none; use fp32, bf16 or autocast-bf16"
        )
    if wanted in ("bf16", "autocast-bf16") and not has_bf16:
        raise UserError(f"engine.precision={wanted}: a {gpu} has no bf16 arithmetic; use fp16 or fp32")
    if wanted in ("bf16", "fp16") and batchnorm and engine.library == "deepspeed":
        raise UserError(
            f"engine.precision={wanted}: this model has a BatchNorm, whose buffers DeepSpeed leaves in fp32; use "
            "engine.precision=autocast-bf16, or a head without one (model.head=linear)"
        )
    return wanted, "engine.precision"


def start(place: Place, recipe: EngineRecipe) -> Runtime:
    """Set threads, choose the device and join the process group; a second run in one process finds it there.

    Args:
        place: of this rank.
        recipe: keys library, collective_timeout_s, and threads (None = the cores that this process may use, shared out
            among the ranks of the machine).

    Raises:
        UserError: a launcher that names no rank.
    """
    threads = recipe.threads or max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    if "MASTER_ADDR" not in os.environ:
        # Alone, without a launcher: DeepSpeed would look for MPI.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    elif "RANK" not in os.environ:
        # What `accelerate launch --cpu --num_processes 2` does without MPI: one process, and no rank in sight.
        raise UserError(
            "MASTER_ADDR is set, but RANK is not: the launcher started one process, or counts ranks in its own "
            "variables; use RANKS=2 launch/accelerate.sh, torchrun or deepspeed (launch/README.md)"
        )
    _init_process_group(device, recipe)
    runtime = Runtime(place, device, threads)
    if dist.get_world_size() != place.world_size:
        raise RuntimeError(f"the process group has {dist.get_world_size()} ranks, the launcher said {place.world_size}")
    return runtime


def _init_process_group(device: torch.device, recipe: EngineRecipe) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=recipe.collective_timeout_s)
    # DeepSpeed makes groups of its own later, without a time limit of its own; torch then takes these.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timeout)
    if not dist.is_initialized():
        # Left at exit, not at the end of a run: DeepSpeed keeps groups of its own for the life of the process, and a
        # second run in it would find them gone.
        atexit.register(_leave)
        dist.init_process_group(backend, timeout=timeout)
    if recipe.library == "deepspeed":
        deepspeed = import_deepspeed()
        if device.type == "cpu":
            # DeepSpeed compiles a shared-memory communicator at first use (a minute, and needs a compiler); gloo serves
            compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
            if compatible is not None:
                compatible["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(backend, timeout=timeout, verbose=False)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
