"""Which rank this process is, by the variables of whatever launched it.

The deepspeed launcher, torchrun and accelerate set RANK and WORLD_SIZE. Schedulers that start the ranks themselves have
variables of their own: slurm's `srun` (SLURM_*), Open MPI's `mpirun` (OMPI_*), MPICH's and Intel's `mpiexec` (PMI_*).
They are used if all that is needed is there. A process that some of them say is one of several, but not which one, must
not go on as a run of its own: several such runs would move each other's run directory aside.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from maskmatch_scale.errors import UserError


@dataclass(frozen=True)
class Place:
    """Which rank this is, as the launcher's environment says; known before any process group exists."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master: tuple[str, int] | None = None
    """Address and port of rank 0; None where the launcher has set MASTER_ADDR and MASTER_PORT, or for a single rank."""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Place:
        """Read the launcher's variables.

        Args:
            env: the environment.

        Raises:
            UserError: a launcher has started several processes but does not say which one this is.
        """
        if "RANK" in env or "WORLD_SIZE" in env:
            return cls._by_torch(env)
        for scheduler in _SCHEDULERS:
            if scheduler.size in env and scheduler.started in env and int(env[scheduler.size]) > 1:
                return cls._by_scheduler(env, scheduler)
        return cls(0, 0, 1, 1)

    @classmethod
    def _by_torch(cls, env: Mapping[str, str]) -> Place:
        """RANK, LOCAL_RANK, WORLD_SIZE, and LOCAL_WORLD_SIZE (torchrun) or LOCAL_SIZE (deepspeed)."""
        world_size = int(env.get("WORLD_SIZE", "1"))
        if world_size > 1 and "RANK" not in env:
            raise UserError(f"WORLD_SIZE={world_size} is set, but RANK is not: {_REMEDY}")
        local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or str(world_size)
        return cls(int(env.get("RANK", "0")), int(env.get("LOCAL_RANK", "0")), world_size, int(local))

    @classmethod
    def _by_scheduler(cls, env: Mapping[str, str], scheduler: _Scheduler) -> Place:
        needed = (scheduler.rank, scheduler.local_rank)
        missing = [name for name in needed if name not in env]
        if missing:
            raise UserError(
                f"{scheduler.size}={env[scheduler.size]} is set, but {missing[0]} is not: {scheduler.name} started "
                f"several processes and does not say which one this is; {_REMEDY}"
            )
        rank, local_rank, world_size = (int(env[name]) for name in (*needed, scheduler.size))
        local_size = _local_size(env, scheduler, world_size)
        return cls(rank, local_rank, world_size, local_size, _master(env, scheduler, world_size, local_size))


@dataclass(frozen=True)
class _Scheduler:
    """A launcher with variables of its own: their names."""

    name: str
    size: str
    rank: str
    local_rank: str
    local_size: str
    started: str
    """Set in the processes that it starts, and not in the script around them."""
    job: tuple[str, ...]
    """Variables that only this job has, alike on all its ranks: the port is derived from them. May be empty."""
    hosts: str | None = None
    """List of the machines, rank 0's first."""


_SCHEDULERS = (
    _Scheduler(
        "srun",
        size="SLURM_NTASKS",
        rank="SLURM_PROCID",
        local_rank="SLURM_LOCALID",
        local_size="SLURM_STEP_TASKS_PER_NODE",
        started="SLURM_STEP_ID",
        job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
        hosts="SLURM_STEP_NODELIST",
    ),
    _Scheduler(
        "mpirun",
        size="OMPI_COMM_WORLD_SIZE",
        rank="OMPI_COMM_WORLD_RANK",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        started="OMPI_COMM_WORLD_SIZE",
        job=("PMIX_NAMESPACE",),
    ),
    _Scheduler(
        "mpiexec",
        size="PMI_SIZE",
        rank="PMI_RANK",
        local_rank="MPI_LOCALRANKID",
        local_size="MPI_LOCALNRANKS",
        started="PMI_SIZE",
        job=(),
    ),
)

_REMEDY = "start it by torchrun, the deepspeed launcher, srun or mpirun (launch/README.md)"
_FIRST_PORT, _PORTS = 20_000, 20_000


def _local_size(env: Mapping[str, str], scheduler: _Scheduler, world_size: int) -> int:
    """Ranks on this machine; of `2(x3),1`, slurm's form, the largest."""
    given = env.get(scheduler.local_size)
    if given is None:
        return world_size
    return max(int(part.partition("(")[0]) for part in given.split(","))


def _master(env: Mapping[str, str], scheduler: _Scheduler, world_size: int, local_size: int) -> tuple[str, int] | None:
    """Where rank 0 is, unless MASTER_ADDR and MASTER_PORT say it."""
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return None
    address = env.get("MASTER_ADDR")
    if address is None and scheduler.hosts is not None and scheduler.hosts in env:
        address = first_host(env[scheduler.hosts])
    if address is None:
        if local_size < world_size:
            raise UserError(
                f"{scheduler.name} started ranks on several machines and does not say where rank 0 is; set "
                "MASTER_ADDR to its host name, and MASTER_PORT to a free port there"
            )
        address = "127.0.0.1"
    if "MASTER_PORT" in env:
        return address, int(env["MASTER_PORT"])
    if not scheduler.job or any(name not in env for name in scheduler.job):
        raise UserError(
            f"{scheduler.name} has set nothing that a port can be derived from; set MASTER_PORT to a free port of rank "
            "0's host"
        )
    job = ".".join(env[name] for name in scheduler.job)
    return address, _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def first_host(hosts: str) -> str:
    """The first machine of a list in slurm's form: `gpu[007-009,12],login` gives `gpu007`."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    match = re.fullmatch(r"([^\[]*)\[(\w+)[^\]]*\](.*)", first)
    return f"{match[1]}{match[2]}{match[3]}" if match else first
