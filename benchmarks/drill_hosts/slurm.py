"""Jobs of a real slurm that are stopped and go on: ``python -m benchmarks.drill_hosts.slurm --out FILE.json``.

Two nodes on this machine (tests/distributed/slurm.py) run launch/slurm.sh with two ranks. Each job is stopped three
times: by a signal, because it is requeued as by pre-emption, and at its time limit. It must go on by itself each time,
take no step twice, and have the losses of a job that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.harness import (
    COMMANDS,
    ROOT,
    check_out,
    describe_machine,
    launch_environment,
    markdown,
    say,
    write_json,
)
from maskmatch_scale.data.writing import write_shards
from tests.conftest import ShapesSource, recipe_maker
from tests.distributed.slurm import Slurm, why_no_slurm
from tests.distributed.ssh import Ssh, why_no_ssh

LAUNCHERS = ("srun", "torchrun", "accelerate", "deepspeed")
SOURCES = ("benchmarks/drill_hosts/slurm.py", "benchmarks/harness.py", "tests/conftest.py",
           "tests/distributed/slurm.py", "tests/distributed/ssh.py", "launch", "maskmatch_scale")  # fmt: skip
COLUMNS = ("launcher", "done", "seen", "steps before", "steps again", "losses", "met")
STEPS_BETWEEN = 8
"""Steps that a session takes before it is stopped; and the last one, which ends by itself."""


@dataclass(frozen=True)
class Row:
    """One thing that was done to a job, or the job as a whole."""

    launcher: str
    done: str
    seen: str
    """What slurm and the run said."""
    right: bool
    """Whether that was right."""
    steps: int | None = None
    """Steps of the run when the job was queued again."""
    steps_again: int | None = None
    """Steps that were taken more than once."""
    losses: float | None = None
    """Largest relative difference of a step's loss from the job that nothing happened to."""
    skipped: str = ""
    """Why nothing was done."""

    @property
    def met(self) -> bool:
        """Whether all is as it should be; a row that was skipped is not held against it."""
        return bool(self.skipped) or (self.right and not self.steps_again and not self.losses)

    def shown(self) -> dict[str, Any]:
        """For the table."""
        losses = None if self.losses is None else "identical" if self.losses == 0 else f"{self.losses:.1e}"
        return {
            "launcher": self.launcher,
            "done": self.done,
            "seen": self.seen,
            "steps before": self.steps,
            "steps again": self.steps_again,
            "losses": losses,
            "met": f"skipped: {self.skipped}" if self.skipped else "yes" if self.met else "no",
        }


class Job:
    """A recipe in a folder of its own, submitted as a user does.

    Args:
        slurm: the cluster.
        folder: of the job; its shards are beside it.
        launcher: LAUNCHER of launch/slurm.sh.
        variables: added to the job's environment.
        steps: of the run.
    """

    def __init__(
        self, slurm: Slurm, folder: Path, launcher: str, variables: dict[str, str], steps: int = 1_000_000
    ) -> None:
        self.slurm, self.folder, self.output = slurm, folder, folder / "output.txt"
        folder.mkdir()
        self.recipe = folder / "recipe.yaml"
        self.set_steps(steps)
        environment = launch_environment(torch.device("cpu")) | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        # The names of the nodes are slurm's alone.
        environment |= {"LAUNCHER": launcher, "RANKS": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
        environment["PATH"] = f"{environment['PATH']}:{slurm.environment['PATH']}"
        self.number = slurm.submit("--nodes=2", "--time=30", f"--output={self.output}", "launch/slurm.sh", self.recipe,
                                   variables=environment | variables, cwd=ROOT)  # fmt: skip

    def set_steps(self, steps: int) -> None:
        """Have the run end after so many steps. The learning rate is constant, so its losses do not depend on them."""
        run = {"steps": steps, "evaluate_every": 0, "log_every": 1, "checkpoint_every": 1_000_000}
        make = recipe_maker(self.folder.parent / "shards", self.folder)
        engine = {"precision": "fp32", "threads": 1}
        self.recipe.write_text(make(engine=engine, optim={"schedule": "constant"}, run=run).to_yaml())

    def records(self) -> list[dict[str, Any]]:
        """Records of steps so far."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [r for r in map(json.loads, (line for line in lines if line.endswith(b"\n"))) if r["kind"] == "train"]

    def printed(self) -> str:
        """What all its sessions have printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for_steps(self, more: int, timeout_s: float = 180.0) -> None:
        """Wait until it has taken so many steps more.

        Raises:
            RuntimeError: it takes too long.
        """
        wanted, until = len(self.records()) + more, time.monotonic() + timeout_s
        while len(self.records()) < wanted:
            if time.monotonic() > until:
                raise RuntimeError(f"no {more} steps more:\n{self.printed()[-3000:]}")
            time.sleep(0.05)

    def finish(self) -> str:
        """Wait until it has ended; returns the state."""
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        return str(self.slurm.wait(self.number, *ended, timeout_s=300.0)["JobState"])

    def losses(self) -> dict[int, float]:
        """The loss of each step."""
        return {record["step"]: record["loss"] for record in self.records()}


def signalled(job: Job) -> None:
    """Send SIGUSR1 to the job's steps."""
    job.slurm.run("scancel", "--signal=USR1", job.number)


def requeued(job: Job) -> None:
    """Have slurm stop the job and queue it again, as it does when another job pre-empts it."""
    job.slurm.run("scontrol", "requeue", job.number)


def out_of_time(job: Job) -> None:
    """Leave the job less time than the five minutes before whose end launch/slurm.sh asks for a signal."""
    job.slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=4")


CASES: tuple[tuple[str, Callable[[Job], None], str], ...] = (
    ("scancel --signal=USR1", signalled, "SIGUSR1"),
    ("scontrol requeue (SIGTERM, as pre-emption)", requeued, "SIGTERM"),
    ("less than 300 s before the time limit", out_of_time, "SIGUSR1"),
)


def stop(job: Job, launcher: str, number: int) -> Row:
    """Do one thing to a running job, and wait until it is queued again."""
    name, do, received = CASES[number]
    job.wait_for_steps(STEPS_BETWEEN)
    said = job.printed().count("maskmatch: stopped: ")
    do(job)
    found = job.slurm.wait(job.number, "PENDING", restarts=number + 1, timeout_s=120.0)
    job.slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    if number == len(CASES) - 1:
        job.set_steps(len(job.records()) + STEPS_BETWEEN)
    until = time.monotonic() + 10
    while job.printed().count("maskmatch: stopped: ") == said and time.monotonic() < until:
        time.sleep(0.1)
    lines = [line for line in job.printed().splitlines() if "maskmatch: stopped: " in line][said:]
    steps = len(job.records())
    heard = {line.partition("got ")[2].partition(";")[0] for line in lines}
    # One line of each node. Launchers of launch/ pass every signal on as SIGUSR1, but slurm may reach the ranks itself.
    right = bool(lines) and all(f"stopped after step {steps}," in line for line in lines)
    right = right and len(heard) == 1 and (launcher != "srun" or heard == {received})
    if not right:
        say(f"{launcher}, {name}: {lines}\n{job.printed()[-3000:]}")
    seen = f"got {' and '.join(sorted(heard)) or 'nothing'}, checkpoint, queued again (restart {found['Restarts']})"
    return Row(launcher, name, seen, right, steps)


def drill(slurm: Slurm, work: Path, launcher: str, variables: dict[str, str]) -> Iterator[Row]:
    """Stop a job three times, let it finish, and compare it with one that nothing happens to."""
    job = Job(slurm, work / launcher, launcher, variables)
    for number in range(len(CASES)):
        yield stop(job, launcher, number)
    state, ours = job.finish(), job.losses()
    other = "accelerate" if launcher == "accelerate" else "srun"  # its engine is another one
    whole = Job(slurm, work / f"whole-{launcher}", other, {}, max(ours))
    if (ended := whole.finish()) != "COMPLETED":
        raise RuntimeError(f"{ended}:\n{whole.printed()[-3000:]}")
    theirs = whole.losses()
    difference = float("inf")
    if ours.keys() == theirs.keys():
        difference = max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)
    again = len(job.records()) - len(ours)
    if state != "COMPLETED":
        say(f"{launcher}: {state}\n{job.printed()[-3000:]}")
    seen = f"{state}, {max(ours)} steps, {slurm.job(job.number)['Restarts']} restarts"
    yield Row(launcher, "finished", seen, state == "COMPLETED", max(ours), again, difference)


def run(launchers: Sequence[str], work: Path) -> Iterator[Row]:
    """All rows, in a new folder."""
    if reason := why_no_slurm():
        yield from (Row(launcher, "", "", False, skipped=reason) for launcher in launchers)
        return
    write_shards(ShapesSource({"labelled": 8, "unlabelled": 24, "dev": 4, "val": 4}), work / "shards", workers=1,
                 samples_per_shard=4, progress=False)  # fmt: skip
    (work / "slurm").mkdir()
    with ExitStack() as stack:
        slurm = stack.enter_context(Slurm(work / "slurm"))
        for launcher in launchers:
            variables: dict[str, str] = {}
            if launcher == "deepspeed":
                if reason := why_no_ssh("pdsh"):
                    yield Row(launcher, "", "", False, skipped=reason)
                    continue
                (work / "ssh").mkdir()
                ssh = stack.enter_context(Ssh(work / "ssh", ("host1", "host2")))
                variables["PATH"] = ssh.path(f"{COMMANDS}:{slurm.environment['PATH']}")
            yield from drill(slurm, work, launcher, variables)
    if left := slurm.processes():
        yield Row("all", "slurm ended", f"{len(left)} processes are left", False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, and write each row as it comes; 1 if something is not as it should be."""
    parser = argparse.ArgumentParser("python -m benchmarks.drill_hosts.slurm", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="a .md is written beside it. Rows "
                        "of other launchers that it has already are kept")  # fmt: skip
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=LAUNCHERS, help="default all")
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
    except ValueError as error:
        parser.error(str(error))
    rows: list[Row] = []
    if options.out.is_file():
        read = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
        kept = [Row(**{name: value for name, value in row.items() if name != "met"}) for row in read]
        rows = [row for row in kept if row.launcher not in (*options.launchers, "all")]
    with tempfile.TemporaryDirectory() as folder:
        for row in run(options.launchers, Path(folder).resolve()):
            rows.append(row)
            say(f"{row.launcher}: {row.done}: {row.seen}: {'met' if row.met else 'NOT MET'}")
            _write(options.out, rows)
    print(options.out.with_suffix(".md").read_text(encoding="utf-8"))
    return int(not all(row.met for row in rows))


def _write(out: Path, rows: Sequence[Row]) -> None:
    machine = describe_machine(torch.device("cpu"), SOURCES)
    write_json(out, machine, [asdict(row) | {"met": row.met} for row in rows])
    page = markdown("Jobs of a real slurm that are stopped and go on", machine, [r.shown() for r in rows], COLUMNS)
    out.with_suffix(".md").write_text(page, encoding="utf-8")


def _end(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)  # what was started is ended on the way out
    raise SystemExit(main())
