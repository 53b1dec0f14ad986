"""Runs on hosts, started by the real launchers from one of them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.drill_hosts.hosts import Host
from benchmarks.harness import COMMANDS, ROOT, launch_environment
from benchmarks.small_runs import RECIPE, records
from maskmatch_scale.recipe import parse_recipe

_PORT = 29500
_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"
"""Without it pdsh waits for ever for a host that is cut off."""

Sections = Mapping[str, Mapping[str, Any]]


class Job:
    """A run and its starts.

    Args:
        folder: of its own: recipe, run directory, and what the launchers print.
        shards: folder of the data.
        sections: keys that replace those of `RECIPE`.
    """

    def __init__(self, folder: Path, shards: Path, sections: Sections) -> None:
        self.folder, self.run = folder, folder / "run"
        folder.mkdir(parents=True)
        content = {name: dict(section) for name, section in RECIPE.items()}
        for name, section in sections.items():
            content[name] |= section
        content["data"] |= {"root": str(shards), "cache_dir": str(folder / "cache")}
        content["run"] |= {"dir": str(self.run), "seed": 0}
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(parse_recipe(content).to_yaml())
        self.starts: list[Start] = []

    def start(self, hosts: Sequence[Host], *overrides: str, **options: Any) -> Start:
        """Start it on hosts, and do not wait; `options` are those of :class:`Start`."""
        self.starts.append(Start(self, len(self.starts), hosts, overrides, **options))
        return self.starts[-1]

    def steps(self) -> int:
        """The last step that has a record; 0: none has."""
        return max((record["step"] for record in records(self.run)), default=0)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.run / "checkpoints" / f"step-{step:08d}"


class Start:
    """One start of a job. Made by :meth:`Job.start`.

    Args:
        job: what is started.
        number: of the start.
        hosts: where its ranks run; rank 0 is on the first.
        overrides: `key=value`.
        slots: ranks of each host.
        origin: the host on which the launcher is started; None: the first of `hosts`.
        launcher: `deepspeed` starts the ranks of all hosts over pdsh and ssh; `deepspeed --no_ssh` and `torchrun` are
            started on each host.
    """

    def __init__(
        self,
        job: Job,
        number: int,
        hosts: Sequence[Host],
        overrides: Sequence[str],
        *,
        slots: int = 1,
        origin: Host | None = None,
        launcher: str = "deepspeed",
    ) -> None:
        self._hosts = {host.name: host for host in [*hosts, *([origin] if origin else [])]}.values()
        self._pattern = f"[{str(job.recipe)[0]}]{str(job.recipe)[1:]}"
        self._log = job.folder / f"start-{number}.txt"
        hostfile, variables = job.folder / f"hosts-{number}.txt", job.folder / f"environment-{number}.txt"
        hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
        # What ranks need beside what deepspeed hands on by itself.
        variables.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
        environment = launch_environment(torch.device("cpu")) | {
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ENV_FILE": str(variables),
            "PDSH_SSH_ARGS_APPEND": _ALIVE,
        }
        command = ["--module", "maskmatch_scale", "train", str(job.recipe), *overrides, "--resume", "auto"]
        by_hostfile = [COMMANDS / "deepspeed", "--hostfile", hostfile, "--no_local_rank", f"--master_port={_PORT}"]
        master = hosts[0].name
        if launcher == "deepspeed":
            starts = [(origin or hosts[0], [*by_hostfile, "--force_multi", *command])]
        elif launcher == "deepspeed --no_ssh":
            each = [*by_hostfile, "--no_ssh", f"--master_addr={master}"]
            starts = [(host, [*each, f"--node_rank={node}", *command]) for node, host in enumerate(hosts)]
        else:
            assert launcher == "torchrun", launcher
            each = [COMMANDS / "torchrun", f"--nnodes={len(hosts)}", f"--nproc-per-node={slots}"]
            each += [f"--master-addr={master}", f"--master-port={_PORT}"]
            starts = [(host, [*each, f"--node-rank={node}", *command]) for node, host in enumerate(hosts)]
        with self._log.open("ab") as log:
            self._processes: list[subprocess.Popen[bytes]] = [
                host.start(words, cwd=ROOT, env=environment, stdout=log, stderr=log) for host, words in starts
            ]

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether a launcher runs."""
        return any(process.poll() is None for process in self._processes)

    @property
    def codes(self) -> set[int]:
        """Exit codes of the launchers that have ended."""
        return {code for process in self._processes if (code := process.poll()) is not None}

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 900.0) -> bool:
        """Wait until something is so; False if the launchers have ended before, or it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.running or time.monotonic() > deadline:
                return condition()
            time.sleep(0.02)
        return True

    def end(self, timeout_s: float = 900.0) -> int:
        """Wait until it has ended by itself on all hosts; what lives later is killed. Returns how many processes."""
        deadline = time.monotonic() + timeout_s
        while self.running and time.monotonic() < deadline:
            time.sleep(0.1)
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.kill()

    def processes(self) -> int:
        """Processes of it that live, on all hosts: launchers, connections, ranks."""
        return sum(len(host.do(f"pgrep -f '{self._pattern}' || true").split()) for host in self._hosts)

    def signal_ranks(self, host: Host, name: str) -> None:
        """Send a signal to the ranks and the launcher's process of one host."""
        host.do(f"pkill -{name} -f '{self._pattern}' || true")

    def kill(self) -> int:
        """Kill what still lives, and wait for its end; returns how many processes."""
        killed = self.processes()
        for host in self._hosts:
            self.signal_ranks(host, "KILL")
        for process in self._processes:
            process.wait(timeout=30)
        return killed
