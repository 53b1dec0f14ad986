"""Joining the process group, under the deepspeed launcher, torchrun or accelerate, or as a single process.

Decision: docs/decisions/0021-process-group-left-at-exit.md.
"""

from __future__ import annotations

import atexit
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.members import Member, connect, meet
from maskmatch_scale.engine.precision import uses_tf32
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import EngineRecipe

GRACE_S = 60
"""Seconds by which torch's own time limit is longer than `engine.collective_timeout_s`: until then engine/watch.py has
said which ranks did not come."""
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def import_deepspeed() -> Any:
    """Import `deepspeed`, for the CPU if there is no GPU, and with its log reduced to warnings."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that torch has renamed. Users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


def start(place: Place, recipe: EngineRecipe) -> Runtime:
    """Set the number of threads, choose the device and join the process group.

    A second run in the same process uses the group that is there.

    Args:
        place: of this rank.
        recipe: keys library, collective_timeout_s, and threads (None = the cores that this process may use, shared out
            among the ranks of the machine).

    Raises:
        UserError: the launcher does not say which rank this is, or has given two ranks the same GPU.
    """
    threads = recipe.threads or max(1, len(os.sched_getaffinity(0)) // place.local_world_size)
    torch.set_num_threads(threads)
    device = device_of(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    announce(place)
    if uses_tf32(device, recipe.precision):
        torch.set_float32_matmul_precision("high")
    _init_process_group(device, recipe)
    if dist.get_world_size() != place.world_size:
        raise RuntimeError(f"the process group has {dist.get_world_size()} ranks, the launcher said {place.world_size}")
    if place.world_size == 1:
        return Runtime(place, device, threads)
    store = connect(recipe.collective_timeout_s)
    return Runtime(place, device, threads, meet(store, place.rank, place.world_size, Member.here(device)))


def announce(place: Place) -> None:
    """Set the variables by which torch, DeepSpeed and accelerate find the other ranks, where the launcher has not.

    Args:
        place: of this rank.

    Raises:
        UserError: the launcher does not say which rank this is.
    """
    if place.world_size > 1 and "RANK" not in os.environ:
        # Started by a scheduler, which has variables of its own; torch, DeepSpeed and accelerate read these.
        os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size)}
        os.environ |= {"LOCAL_RANK": str(place.local_rank), "LOCAL_WORLD_SIZE": str(place.local_world_size)}
    if place.master is not None:
        address, port = place.master
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    if "MASTER_ADDR" not in os.environ:
        # There is no launcher. Without these variables DeepSpeed would look for MPI.
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    elif "RANK" not in os.environ:
        # Without MPI `accelerate launch --cpu --num_processes 2` starts one process and sets no RANK.
        raise UserError(
            "MASTER_ADDR is set, but RANK is not: the launcher started one process, or has variables of its own for "
            "ranks; use RANKS=2 launch/accelerate.sh, torchrun or deepspeed (launch/README.md)"
        )


@contextmanager
def environment_kept(place: Place) -> Iterator[None]:
    """Take back what :func:`start` adds to the environment of a process without a launcher, when the body ends.

    A notebook goes on after a run, and what it starts then, such as a run in another process, would take itself for a
    rank of this one, and its port for free.

    Args:
        place: of this rank. With several ranks nothing is taken back, because messages are by rank.
    """
    before = {name: os.environ.get(name) for name in _OF_A_RANK}
    try:
        yield
    finally:
        for name, value in before.items() if place.world_size == 1 else ():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def device_of(place: Place) -> torch.device:
    """The device that a rank takes: its GPU, or the CPU of a machine without GPUs.

    Raises:
        UserError: the machine has GPUs, but not one for each rank.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", gpu_of(place.local_rank, torch.cuda.device_count()))


def gpu_of(local_rank: int, visible: int) -> int:
    """Which of the visible GPUs a rank takes.

    Args:
        local_rank: of the ranks on this machine.
        visible: GPUs that this process sees. One: the scheduler shows each rank its own.

    Raises:
        UserError: there are several, but not one for each rank.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"rank {local_rank} of this machine has no GPU: {visible} are visible; start {visible} ranks on each "
            "machine, or correct CUDA_VISIBLE_DEVICES"
        )
    return local_rank


def _init_process_group(device: torch.device, recipe: EngineRecipe) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=recipe.collective_timeout_s + GRACE_S)
    # DeepSpeed makes further groups later and gives them no time limit. torch then uses these.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timeout)
    if not dist.is_initialized():
        # The group is left at exit, not at the end of a run: DeepSpeed keeps groups for the life of the process, and a
        # second run in it would find them gone.
        atexit.register(_leave)
        dist.init_process_group(backend, timeout=timeout)
    if recipe.library == "deepspeed":
        deepspeed = import_deepspeed()
        if device.type == "cpu":
            # At first use DeepSpeed would compile a shared-memory communicator, which takes a minute and needs a
            # compiler. gloo is used instead.
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
