"""Two ranks that are stopped: they agree on a step, write a checkpoint, and go on from it; under the real launchers."""

import json
import os
import signal
import subprocess
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
    "evaluation": {"rank": 1, "step": 5, "signal": "SIGTERM", "evaluation": True},
    "last": {"rank": 0, "step": 8, "signal": "SIGINT"},
    "failure": {"rank": 1, "step": 3, "ask": 1},
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
        "deepspeed": deepspeed_command(*train),
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--standalone", *train],
    }[launcher]


def left_over(recipe):
    """Processes of the job that still run; they get a second to notice that it has ended."""
    until = time.monotonic() + 1
    while True:
        found = [
            process
            for process in psutil.process_iter(["cmdline", "status"])
            if str(recipe) in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE
        ]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("launcher", "name", "to_all", "code"),
    [
        ("deepspeed.sh", "SIGTERM", False, 75),
        ("accelerate.sh", "SIGINT", False, 75),
        # Ctrl-C and slurm reach every process of the job.
        pytest.param("deepspeed.sh", "SIGINT", True, 75, marks=pytest.mark.slow),
        # The launchers alone: a checkpoint, but codes of their own. docs/stopping.md
        pytest.param("deepspeed", "SIGINT", True, None, marks=pytest.mark.slow),
        pytest.param("torchrun", "SIGTERM", False, 1, marks=pytest.mark.slow),
    ],
)
def test_under_launchers(make_recipe, tmp_path, launcher, name, to_all, code):
    recipe = tmp_path / "recipe.yaml"
    run = {"steps": 5000, "evaluate_every": 0, "log_every": 1}
    recipe.write_text(make_recipe(data={"workers": 1}, run=run).to_yaml())
    folder = RunFolder(tmp_path / "run")
    marker = tmp_path / "exit-code"
    clean = {key: value for key, value in environment().items() if key not in TORCHS}
    clean |= {"RANKS": "2", "MASKMATCH_EXIT_CODE_FILE": str(marker)}
    shown = tmp_path / "shown.txt"
    with (
        shown.open("w") as output,
        subprocess.Popen(
            command_of(launcher, recipe), env=clean, stdout=output, stderr=output, start_new_session=True
        ) as job,
    ):
        until = time.monotonic() + 300
        while not folder.metrics.exists() or len(folder.metrics.read_bytes().splitlines()) < 3:
            assert job.poll() is None, shown.read_text()[-3000:]
            assert time.monotonic() < until
            time.sleep(0.05)
        (os.killpg if to_all else os.kill)(job.pid, getattr(signal, name))
        job.wait(120)
        until = time.monotonic() + 60
        while left_over(recipe):  # `deepspeed` itself dies of a Ctrl-C before its ranks have ended
            assert code is None, shown.read_text()[-3000:]
            assert time.monotonic() < until
    text = shown.read_text()
    if code is not None:
        assert job.returncode == code, text[-3000:]
    lines = [line for line in text.splitlines() if line.startswith("maskmatch: stopped: ")]
    assert len(lines) == 1, text[-3000:]
    newest = folder.checkpoints / folder.checkpoints.joinpath("latest").read_text()
    assert f"checkpoint {newest}; go on with: maskmatch train " in lines[0]
    assert lines[0].endswith("--resume auto (under the same launcher)")
    assert newest.name == f"step-{records(folder.path)[-1]['step']:08d}"
    assert not folder.lock.exists()
    if not launcher.endswith(".sh"):
        assert marker.read_text() == "75\n"
