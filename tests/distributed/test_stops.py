"""Two ranks that are stopped: they agree on a step, write a checkpoint, and go on from it; under the real launchers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from maskmatch_scale.engine.processes import Process
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.lock import Owner
from tests.conftest import recipe_maker
from tests.distributed.launching import BIN, deepspeed, deepspeed_command, environment, records

pytestmark = pytest.mark.distributed

LAUNCH = Path(__file__).parents[2] / "launch"
TORCHS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
SETTINGS = {"steps": 8, "checkpoint_every": 5, "evaluate_every": 5, "log_every": 10}
JOBS = {
    "signal": {"rank": 1, "step": 2, "signal": "SIGUSR1"},
    "evaluation": {"rank": 1, "step": 5, "signal": "SIGTERM", "when": "evaluation"},
    "last": {"rank": 0, "step": 8, "signal": "SIGINT"},
    "failure": {"rank": 1, "step": 3, "ask": 1},
    "late": {"rank": 1, "step": 8, "when": "between_steps", "ask": 1},
}


@pytest.fixture(scope="module")
def stopped(shapes, tmp_path_factory):
    """The folder of all runs, and how each ended on each rank."""
    folder = tmp_path_factory.mktemp("stops")
    make = recipe_maker(shapes, folder)

    def recipe_of(name):
        engine = {"zero_stage": 3 if name in ("whole", "signal") else 1}
        run = SETTINGS | {"dir": str(folder / name)}
        return make(data={"workers": 1}, engine=engine, run=run).model_dump(mode="json")

    names, jobs = [], []
    for name, job in {"whole": {}, "occupied": {}, **JOBS}.items():
        names.append(name)
        jobs.append({"recipe": recipe_of(name)} | job)
    for name in JOBS:
        names.append(f"{name} again")
        jobs.append({"recipe": recipe_of(name), "resume": "auto"})
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    over = threading.Event()
    occupant = threading.Thread(target=_occupy, args=(RunFolder(folder / "occupied"), over))
    occupant.start()
    try:
        done = deepspeed(Path(__file__).with_name("stops.py"), file)
    finally:
        over.set()
        occupant.join()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ends = [json.loads((folder / f"ends-{rank}.json").read_text()) for rank in range(2)]
    return folder, {name: [of_rank[number] for of_rank in ends] for number, name in enumerate(names)}


def _occupy(folder, over):
    """What a live run on another machine does: its process cannot be looked at, and it touches its lock."""
    folder.path.mkdir()
    owner = replace(Owner.this(), host="gpu007", process=Process(1, "elsewhere"))
    folder.lock.write_text(json.dumps(asdict(owner)))
    while not over.wait(0.2):
        os.utime(folder.lock)


def test_a_signal_to_one_rank_stops_both_after_the_same_step(stopped):
    folder, ends = stopped
    checkpoint = folder / "signal" / "checkpoints" / "step-00000004"  # two steps later
    line = f"rank 1: got SIGUSR1; stopped after step 4, checkpoint {checkpoint}"
    assert ends["signal"] == [[line, 75], [line, 75]]
    assert ends["signal again"] == [["finished", 0]] * 2
    assert [r["step"] for r in records(folder / "signal")] == list(range(1, 9))
    assert [r["loss"] for r in records(folder / "signal")] == [r["loss"] for r in records(folder / "whole")]


def test_a_signal_to_one_rank_breaks_an_evaluation_off_on_both(stopped):
    folder, ends = stopped
    checkpoint = folder / "evaluation" / "checkpoints" / "step-00000005"
    line = f"rank 1: got SIGTERM; stopped after step 5, checkpoint {checkpoint}"
    assert ends["evaluation"] == [[line, 75], [line, 75]]
    assert ends["evaluation again"] == [["finished", 0]] * 2
    # The second start has made up for it.
    assert [r["step"] for r in records(folder / "evaluation", "eval")] == [5, 8, 8]


def test_a_signal_in_the_last_step(stopped):
    folder, ends = stopped
    checkpoint = folder / "last" / "checkpoints" / "step-00000008"
    line = f"rank 0: got SIGINT; stopped after step 8, checkpoint {checkpoint}"
    assert ends["last"] == [[line, 75], [line, 75]]
    assert ends["last again"] == [["finished", 0]] * 2
    assert [(r["step"], r["weights"]) for r in records(folder / "last", "eval")] == [
        *((5, "ema"), (8, "ema"), (8, "student"))
    ]
    assert (folder / "last" / "summary.json").is_file()


def test_one_rank_asks_for_an_end_with_an_error(stopped):
    folder, ends = stopped
    assert ends["failure"] == [["rank 1: seen enough", 1]] * 2
    assert (folder / "failure" / "checkpoints" / "step-00000005").is_dir()


def test_one_rank_asks_after_the_last_step(stopped):
    folder, ends = stopped
    assert ends["late"] == [["rank 1: seen enough", 1]] * 2
    assert (folder / "late" / "checkpoints" / "step-00000008").is_dir()


def test_all_ranks_are_refused_where_another_machines_run_is_alive(stopped):
    folder, ends = stopped
    assert ends["occupied"][0] == ends["occupied"][1]
    message, where = ends["occupied"][0]
    assert "another run writes there (process 1 on gpu007, since" in message
    assert where == "on all ranks"
    assert [path.name for path in (folder / "occupied").iterdir()] == [".lock"]


def command_of(launcher, recipe):
    train = ["--module", "maskmatch_scale", "train", str(recipe)]
    return {
        "deepspeed.sh": [str(LAUNCH / "deepspeed.sh"), str(recipe)],
        "accelerate.sh": [str(LAUNCH / "accelerate.sh"), str(recipe)],
        "none": [sys.executable, "-m", *train[1:]],
        "deepspeed": deepspeed_command(*train),
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--standalone", *train],
    }[launcher]


class Job:
    """A run of many steps, started as a user would start it."""

    def __init__(self, make_recipe, folder, launcher):
        self.recipe, self.folder, self.marker = folder / "recipe.yaml", RunFolder(folder / "run"), folder / "exit-code"
        run = {"steps": 5000, "evaluate_every": 0, "log_every": 1}
        self.recipe.write_text(make_recipe(data={"workers": 1}, run=run).to_yaml())
        self._output = folder / "shown.txt"
        clean = {key: value for key, value in environment().items() if key not in TORCHS}
        clean |= {"RANKS": "2", "MASKMATCH_EXIT_CODE_FILE": str(self.marker)}
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [*command_of(launcher, self.recipe), "--resume", "auto"],
                env=clean,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def shown(self):
        return self._output.read_text()

    def wait_for_steps(self, count=3):
        known = self._lines()
        until = time.monotonic() + 300
        while self._lines() < known + count:
            assert self.process.poll() is None, self.shown[-3000:]
            assert time.monotonic() < until
            time.sleep(0.05)

    def _lines(self):
        return len(self.folder.metrics.read_bytes().splitlines()) if self.folder.metrics.exists() else 0

    def left_over(self, seconds=3.0):
        """Processes of the job that still run; they get a while to notice that it has ended."""
        until = time.monotonic() + seconds
        while True:
            found = [
                process
                for process in psutil.process_iter(["cmdline", "status"])
                if str(self.recipe) in (process.info["cmdline"] or []) and process.info["status"] != "zombie"
            ]
            if not found or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def end(self):
        for process in self.left_over(0):
            process.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(make_recipe, tmp_path):
    started = []

    def start(launcher):
        started.append(Job(make_recipe, tmp_path, launcher))
        return started[-1]

    yield start
    for job in started:
        job.end()


@pytest.mark.parametrize(
    ("launcher", "name", "to_all", "code"),
    [
        ("none", "SIGINT", True, 75),
        ("deepspeed.sh", "SIGTERM", False, 75),
        pytest.param("accelerate.sh", "SIGINT", False, 75, marks=pytest.mark.slow),
        # Ctrl-C and slurm reach every process of the job.
        pytest.param("deepspeed.sh", "SIGINT", True, 75, marks=pytest.mark.slow),
        # The launchers alone: a checkpoint, but codes of their own. docs/stopping.md
        pytest.param("deepspeed", "SIGINT", True, None, marks=pytest.mark.slow),
        pytest.param("torchrun", "SIGTERM", False, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_with_a_checkpoint(start, launcher, name, to_all, code):
    job = start(launcher)
    job.wait_for_steps()
    (os.killpg if to_all else os.kill)(job.process.pid, getattr(signal, name))
    job.process.wait(120)
    # `deepspeed` itself dies of a Ctrl-C before its ranks have ended.
    assert not job.left_over(3 if code is not None else 60)
    if code is not None:
        assert job.process.returncode == code, job.shown[-3000:]
    lines = [line for line in job.shown.splitlines() if line.startswith("maskmatch: stopped: ")]
    assert len(lines) == 1, job.shown[-3000:]
    newest = job.folder.checkpoints / (job.folder.checkpoints / "latest").read_text()
    assert f"checkpoint {newest}; go on with: maskmatch train " in lines[0]
    assert lines[0].endswith("--resume auto" if launcher == "none" else "--resume auto (under the same launcher)")
    assert newest.name == f"step-{records(job.folder.path)[-1]['step']:08d}"
    assert not job.folder.lock.exists()
    if not launcher.endswith(".sh"):
        assert job.marker.read_text() == "75\n"


def test_after_a_sigkill_loaders_are_gone_at_once_and_the_folder_is_free(start):
    first = start("none")
    first.wait_for_steps()
    loaders = psutil.Process(first.process.pid).children()
    assert loaders
    first.process.kill()
    assert not first.left_over()
    assert first.folder.lock.exists()
    second = start("none")
    second.wait_for_steps()
    assert "was locked by a run that has died (process " in second.shown
    third = start("none")
    assert third.process.wait(120) == 2
    assert f"another run writes there (process {second.process.pid} on " in third.shown
    second.wait_for_steps()  # and is not disturbed
