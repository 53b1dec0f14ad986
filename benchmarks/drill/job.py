"""A job: one run that is started again and again by real launchers, each start a session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from benchmarks.drill.preloaded import Forked
from benchmarks.drill.witness import NOTES, SESSION
from benchmarks.harness import COMMANDS, ROOT, deepspeed_command, free_port, launch_environment
from benchmarks.small_runs import records
from maskmatch_scale.recipe import parse_recipe

MODULE = "benchmarks.drill.rank"
LAUNCHERS = ("deepspeed", "torchrun", "accelerate", "none")
"""With launch/stoppable.py before them. none: the ranks are started as `srun` starts them, without a launcher."""
PRELOADED = "preloaded"
"""The same as none, and quicker (preloaded.py)."""
WITHOUT = ("none", PRELOADED)
"""Nothing stands before the ranks."""

_MARK = "DRILL_MARK"
"""Environment variable that the processes of a session have in common."""

Note = dict[str, Any]
_POLL_S = 0.002
_GRACE_S = 5.0


class Job:
    """A run and its sessions.

    Args:
        folder: of its own: recipe, run directory, notes, cache, and what the sessions print.
        recipe: sections and keys; `run.dir` and `data.cache_dir` are filled in.
        run: the run directory; None: within `folder`.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Mapping[str, Any]], run: Path | None = None) -> None:
        self.folder, self.run, self.cache = folder, run or folder / "run", folder / "cache"
        folder.mkdir(parents=True)
        content = {name: dict(section) for name, section in recipe.items()}
        content["run"]["dir"], content["data"]["cache_dir"] = str(self.run), str(self.cache)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(parse_recipe(content).to_yaml())
        self.sessions: list[Session] = []
        self._notes = folder / "notes.jsonl"
        self._read: list[Note] = []
        self._offset = 0

    def start(self, launcher: str, *overrides: str, ranks: int = 2, resume: str | None = "auto") -> Session:
        """Start it, and do not wait.

        Args:
            launcher: one of `LAUNCHERS`, or `PRELOADED`.
            overrides: `key=value`.
            ranks: how many.
            resume: what `--resume` is given; None: nothing.
        """
        arguments = ["train", str(self.recipe), *overrides, *(["--resume", resume] if resume else [])]
        session = Session(self, len(self.sessions), launcher, ranks, arguments)
        self.sessions.append(session)
        return session

    def copy(self, folder: Path) -> Job:
        """Another job that goes on from where this one is: its run, its notes, and the numbers of its sessions."""
        content = yaml.safe_load(self.recipe.read_text())
        job = Job(folder, content)
        shutil.copytree(self.run, job.run, symlinks=True)
        shutil.copy(self._notes, job._notes)
        job.sessions = list(self.sessions)
        return job

    def finish(self, launcher: str, *overrides: str, ranks: int = 2, resume: str | None = "auto") -> Session:
        """Start it, and wait until it has ended."""
        session = self.start(launcher, *overrides, ranks=ranks, resume=resume)
        session.end()
        return session

    def notes(self, what: str | None = None) -> list[Note]:
        """What its ranks have noted so far, of one kind or of all."""
        if self._notes.exists():
            with self._notes.open("rb") as file:
                file.seek(self._offset)
                lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._offset += len(whole)
            self._read += map(json.loads, whole.splitlines())
        return [note for note in self._read if what in (None, note["what"])]

    def records(self, kind: str = "train") -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`; a last line that was cut off is left out."""
        return records(self.run, kind)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.run / "checkpoints" / f"step-{step:08d}"


class Session:
    """One start of a job, from its launcher to its last process. Made by `Job.start`."""

    def __init__(self, job: Job, number: int, launcher: str, ranks: int, arguments: Sequence[str]) -> None:
        self.job, self.number, self.launcher, self.world_size = job, number, launcher, ranks
        self.outlived = 0
        """Processes that still lived `_GRACE_S` after the launcher had ended."""
        self._mark = f"{job.folder}#{number}"
        self._log = job.folder / f"session-{number}.txt"
        environment = launch_environment(torch.device("cpu")) | {
            "CUDA_VISIBLE_DEVICES": "",
            NOTES: str(job.folder / "notes.jsonl"),
            SESSION: str(number),
        }
        self._started: list[subprocess.Popen[bytes] | Forked] = []
        with self._log.open("ab") as log:
            for variables, command in _commands(launcher, ranks, arguments):
                if launcher == PRELOADED:
                    forked = Forked(environment | variables, arguments, self._log)
                    _forked[forked.pid] = self._mark
                    self._started.append(forked)
                else:
                    env = environment | variables | {_MARK: self._mark}
                    process = subprocess.Popen(
                        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                    self._started.append(process)

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def first(self) -> psutil.Process:
        """The process in front: of the launcher, or of rank 0."""
        return psutil.Process(self._started[0].pid)

    @property
    def running(self) -> bool:
        """Whether what was started by us still runs: the launcher, or a rank."""
        return any(process.poll() is None for process in self._started)

    @property
    def codes(self) -> list[int]:
        """Exit codes of the launcher, or of the ranks; without those that still run."""
        return [code for process in self._started if (code := process.poll()) is not None]

    def notes(self, what: str | None = None) -> list[Note]:
        """What its ranks have noted, of one kind or of all."""
        return [note for note in self.job.notes(what) if note["session"] == self.number]

    def begun(self) -> bool:
        """Whether every rank has built the run."""
        return len({note["rank"] for note in self.notes("begins")}) == self.world_size

    def steps(self) -> int:
        """Steps that rank 0 has taken."""
        return sum(note["rank"] == 0 for note in self.notes("step"))

    def step(self) -> int:
        """The last step of the run that a rank has taken in it; 0 before its first one."""
        return max((int(note["step"]) for note in self.notes("step")), default=0)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> bool:
        """Wait until something is so; False if the session has ended first, or it takes too long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return True
            if not self.running:
                return condition()
            time.sleep(_POLL_S)
        return False

    def processes(self) -> list[psutil.Process]:
        """All that live: launcher, ranks and loader processes."""
        return _marked(lambda mark: mark == self._mark)

    def workers(self) -> list[psutil.Process]:
        """The ranks that live, and the loader processes, without the launcher."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if self.launcher == PRELOADED or "RANK" in process.environ():
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks, without loader processes."""
        if self.launcher == PRELOADED:
            living = {process.pid: process for process in self.processes()}
            return {rank: living[p.pid] for rank, p in enumerate(self._started) if p.pid in living}
        found: dict[int, psutil.Process] = {}
        for process in sorted(self.workers(), key=lambda process: process.create_time()):
            with suppress(psutil.Error):
                if MODULE in process.cmdline() and process.ppid() not in {rank.pid for rank in found.values()}:
                    found.setdefault(int(process.environ()["RANK"]), process)
        return found

    def signal(self, number: int, processes: Iterable[psutil.Process]) -> None:
        """Send a signal to some processes."""
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(number)

    def end(self, timeout_s: float = 300.0) -> list[int]:
        """Wait until it has ended by itself; the exit codes. What still lives after that long is killed."""
        deadline = time.monotonic() + timeout_s
        while self.running and time.monotonic() < deadline:
            time.sleep(0.02)
        deadline = time.monotonic() + _GRACE_S
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.outlived = self.kill()
        return self.codes

    def kill(self) -> int:
        """Kill what still lives, and wait for its end; how many processes that were."""
        killed = 0
        while alive := self.processes():
            killed += len(alive)
            for process in alive:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(alive, timeout=10)
        for process in self._started:
            process.wait()
        return killed


def _commands(launcher: str, ranks: int, arguments: Sequence[str]) -> list[tuple[dict[str, str], list[str]]]:
    """Variables and command of each process that is to be started."""
    python, port = str(COMMANDS / "python"), free_port()
    if launcher in WITHOUT:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        place["LOCAL_WORLD_SIZE"] = str(ranks)
        return [
            (place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, [python, "-m", MODULE, *arguments])
            for rank in range(ranks)
        ]
    if launcher == "deepspeed":
        command = deepspeed_command(ranks, torch.device("cpu"), MODULE, *arguments)
    elif launcher == "torchrun":
        command = [str(COMMANDS / "torchrun"), f"--nproc-per-node={ranks}", f"--master-port={port}"]
        command += ["--module", MODULE, *arguments]
    else:
        assert launcher == "accelerate", launcher
        command = [str(COMMANDS / "accelerate"), "launch", "--multi_gpu", f"--num_processes={ranks}"]
        command += ["--num_machines=1", f"--main_process_port={port}", "--mixed_precision=no", "--dynamo_backend=no"]
        command += ["--module", MODULE, *arguments]
    return [({}, [python, str(ROOT / "launch" / "stoppable.py"), *command])]  # as launch/*.sh do


def left_over(folder: Path) -> list[psutil.Process]:
    """Processes of any job below a folder that still live."""
    return _marked(lambda mark: mark.startswith(f"{folder}{os.sep}"))


_forked: dict[int, str] = {}
"""The marks of ranks that were forked, by their session ids."""


def _marked(wanted: Callable[[str], bool]) -> list[psutil.Process]:
    """Living processes whose mark is wanted; zombies do not live."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            mark = _forked.get(os.getsid(process.pid)) or process.environ().get(_MARK)
            if mark is not None and wanted(mark) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
