"""`maskmatch sweep`: what is run, in which order, under what name, and what is left when something goes wrong."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.lock import FolderLock
from maskmatch_scale.sweep import run as sweep
from maskmatch_scale.sweep.plan import plan
from tests.record.conftest import SUPERVISED, write_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def launcher(tmp_path):
    """A command in the place of a launcher: it leaves a run directory that the learning rate decides on.

    1: mIoU 0.4. 2: mIoU 0.6. 3: the loss is not finite. 4: ends before it has written anything. 5: asks to stop.
    """
    program = tmp_path / "launched.py"
    program.write_text(f"""
import json, os, shutil, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from maskmatch_scale.recipe import load_recipe
from tests.record.conftest import SUPERVISED, write_run
words = sys.argv[1:]
with open({str(tmp_path / "started")!r}, "a") as started:
    started.write(" ".join(words) + "\\n")
resume = words[-2:] == ["--resume", "auto"]
recipe = load_recipe(words[0], words[1 : -2 if resume else None])
run, lr = Path(recipe.run.dir), recipe.optim.lr
if lr == 4:
    Path(os.environ["MASKMATCH_EXIT_CODE_FILE"]).write_text("2")
    sys.exit(1)
shutil.rmtree(run, ignore_errors=True)
score = {{1: 0.4, 2: 0.6}}.get(lr, 0.5) if lr != 3 else None
stops = lr == 5 and not resume
write_run(run, method=SUPERVISED, steps=3, steps_asked=3, at_end=score, closed=lr != 3 and not stops)
(run / "recipe.yaml").write_text(recipe.to_yaml())
if lr == 3:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\\n".join(lines[:-1]) + '\\n{{"kind": "train", "step": 3, "loss": NaN}}\\n')
sys.exit(1 if lr == 3 else 75 if stops else 0)
""")
    return [sys.executable, str(program)]


def started(tmp_path):
    file = tmp_path / "started"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["optim.lr=1e-5"], "no key has several values"),
        (["optim.lr=1e-5,1e-4", "optim.lr=1e-3"], "optim.lr is given twice"),
        (["optim.lr=1e-5,1e-4", "run.dir=there"], "run.dir=there: every run of a sweep has its own"),
        (["optim.lr=1e-5,1e-5"], "two runs would have the folder"),
        (["optim.lr=1e-5,fast"], 'optim.lr="fast"'),
        (["optim.lr=1e-5,1e-4", "optim.wd=1"], "unknown key optim.wd=1"),
        (["optim.lr=1e-5,1e-4", "more"], "'more': write it as section.key=value"),
        (["method.mask.keep=0.5,"], "method.mask.keep=0.5,: there is no value on one side of a comma; for none, write"),
        (["method.mask.keep=0.3,0.5", "method.mask={weight: 2}"], "method.mask.keep is part of method.mask, so one"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(maskmatch, recipe_file, tmp_path, overrides, part):
    code, out, err = maskmatch("sweep", recipe_file, *overrides, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert part in err
    assert not (tmp_path / "out").exists()


def test_other_mistakes(maskmatch, recipe_file, tmp_path, monkeypatch):
    given = ("sweep", recipe_file, "optim.lr=1,2", "--out", tmp_path / "out")
    for more, part in (
        (["--resume", "runs/x"], "--resume runs/x: a sweep knows its runs by --out"),
        (["--launcher", "'torchrun"], "--launcher"),
        (["--launcher", "no-such-launcher"], "no-such-launcher cannot be started: No such file"),
    ):
        code, _, err = maskmatch(*given, *more)
        assert (code, err.count("\n"), part in err) == (2, 1, True), err
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = maskmatch(*given)
    assert (code, "without a launcher" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_runs_that_fail_are_listed_and_the_rest_goes_on(maskmatch, recipe_file, tmp_path, launcher):
    out = tmp_path / "out"
    given = ("sweep", recipe_file, "optim.lr=3,1,4,2", "--out", out, "--launcher", shlex.join(launcher))
    code, shown, err = maskmatch(*given)
    assert code == 1
    assert "2 of 4 runs failed: optim.lr=4; optim.lr=3" in err or "2 of 4 runs failed: optim.lr=3; optim.lr=4" in err
    assert shown.startswith(f"sweep: 4 runs in {out}\n")
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith("optim.lr=")]
    assert [(row[0], row[1]) for row in rows[:2]] == [("optim.lr=2", "0.6000"), ("optim.lr=1", "0.4000")]
    assert {" ".join(row[5:]) for row in rows[2:]} == {"failed: loss not finite at step 3", "failed: exit code 2"}
    assert "best: optim.lr=2, mIoU 0.6000" in shown
    page = (out / "report.html").read_text()
    assert all(f"optim.lr={value}" in page for value in (1, 2, 3))
    assert not (out / "optim.lr=4").exists()

    code, _, err = maskmatch(*given)
    assert (code, "optim.lr=3 is there already; go on with that sweep by --resume auto" in err) == (2, True)
    first = started(tmp_path)
    code, shown, _ = maskmatch(*given, "--resume", "auto")
    assert code == 1
    assert shown.startswith(f"sweep: 4 runs in {out}, 2 of them finished\n")
    again = started(tmp_path)[len(first) :]
    assert [words[-1 if "--resume" not in words else -3] for words in again] == [
        f'run.dir="{out}/optim.lr=3"',
        f'run.dir="{out}/optim.lr=4"',
    ]
    assert ["--resume" in words for words in again] == [True, False]  # of one that wrote nothing there is nothing


def test_finished_runs_must_be_of_this_recipe(maskmatch, recipe_file, tmp_path, launcher):
    given = ("sweep", recipe_file, "optim.lr=1,2", "--out", tmp_path / "out", "--launcher", shlex.join(launcher))
    assert maskmatch(*given)[0] == 0
    more = (*given, "--resume", "auto")
    for key, part in (
        ("run.seed=1", "another run.seed"),
        ("optim.weight_decay=0.5", "another optim"),
        ("data.crop_px=96", "another data.crop_px"),
        ("data.labelled_count=2", "another data.labelled_count"),
        ("engine.micro_batch=3", "another engine.micro_batch"),
        ("engine.accumulation=2", "another engine.accumulation"),
    ):
        code, _, err = maskmatch(*more, key)
        assert (code, part in err) == (2, True)
    before = len(started(tmp_path))
    code, shown, _ = maskmatch(*more, "run.log_every=2", "data.workers=1", "data.cache_gb=3")
    assert (code, len(started(tmp_path)) - before) == (0, 0)
    assert "best: optim.lr=2" in shown
    assert maskmatch(*more, "run.steps=5")[0] == 0  # longer than they were
    assert len(started(tmp_path)) - before == 2


def test_a_run_that_ended_early_is_finished_unless_its_patience_has_grown(maskmatch, recipe_file, tmp_path, launcher):
    early = ("run.steps=9", "run.evaluate_every=1", "run.patience=2")
    given = ("sweep", recipe_file, "optim.lr=1,2", "--out", tmp_path / "out", "--launcher", shlex.join(launcher))
    assert maskmatch(*given, *early)[0] == 0
    for value in (1, 2):
        summary = tmp_path / "out" / f"optim.lr={value}" / "summary.json"
        found = {"step": 3, "best_step": 1, "best_miou": 0.5, "evaluations": 2}
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"ended_early": found}))
    before = len(started(tmp_path))
    code, shown, _ = maskmatch(*given, *early, "--resume", "auto")
    assert (code, len(started(tmp_path)) - before) == (0, 0)
    assert "2 of them finished" in shown
    assert maskmatch(*given, *early[:2], "run.patience=3", "--resume", "auto")[0] == 0
    assert len(started(tmp_path)) - before == 2


def test_runs_compare_by_their_own_evaluations(maskmatch, recipe_file, tmp_path, launcher):
    """`maskmatch evaluate --split dev evaluation.flip=true` gives a better score, of the same step."""
    out = tmp_path / "out"
    given = ("sweep", recipe_file, "optim.lr=1,2,6", "--out", out, "--launcher", shlex.join(launcher))
    assert maskmatch(*given)[0] == 0
    chart = (out / "report.html").read_text().partition("mIoU on dev by optim.lr")[2]
    flipped = {"split": "dev", "weights": "ema", "step": 3, "miou": 0.9, "inference": "with mirror images"}
    (out / "optim.lr=1" / "evaluation").mkdir(exist_ok=True)
    (out / "optim.lr=1" / "evaluation" / "dev-ema.json").write_text(json.dumps(flipped))
    code, shown, _ = maskmatch(*given, "--resume", "auto")
    assert code == 0
    assert "best: optim.lr=2, mIoU 0.6000" in shown
    again = (out / "report.html").read_text().partition("mIoU on dev by optim.lr")[2]
    assert again.partition("</svg>")[0] == chart.partition("</svg>")[0] != ""


def test_a_live_run_in_the_folder_ends_the_sweep(maskmatch, recipe_file, tmp_path, launcher):
    out = tmp_path / "out"
    given = ("sweep", recipe_file, "optim.lr=1,2", "--out", out, "--launcher", shlex.join(launcher))
    lock = FolderLock(RunFolder(out / "optim.lr=2"))
    try:
        code, _, err = maskmatch(*given)
    finally:
        lock.release()
    assert (code, err.count("\n")) == (2, 1)
    assert "optim.lr=2: another run writes there (process" in err
    assert len(started(tmp_path)) == 1


def test_a_run_that_stops_ends_the_sweep(maskmatch, recipe_file, tmp_path, launcher):
    out = tmp_path / "out"
    given = ("sweep", recipe_file, "optim.lr=5,2", "--out", out, "--launcher", shlex.join(launcher))
    code, shown, err = maskmatch(*given)
    assert code == 75
    assert "the sweep ends in optim.lr=5; go on with: maskmatch sweep" in err
    assert err.rstrip().endswith("--resume auto")
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith("optim.lr=")]
    assert {row[0]: row[-1] for row in rows} == {"optim.lr=5": "stopped", "optim.lr=2": "waiting"}
    assert maskmatch(*given, "--resume", "auto")[0] == 0
    assert [words[-2:] == ["--resume", "auto"] for words in started(tmp_path)] == [False, True, False]


def test_a_full_disk_keeps_the_report_away_and_the_sweep_going(recipe_file, small_disk, capfd):
    disk = small_disk(kib=256)
    trials = plan(recipe_file, ["optim.lr=1,2"], disk.path / "out")
    write_run(trials[0].folder.path, method=SUPERVISED)
    disk.fill()
    assert sweep._report(trials, disk.path / "out") is None
    assert "no report: " in capfd.readouterr().out
    disk.free()
    assert sweep._report(trials, disk.path / "out") == disk.path / "out" / "report.html"


@pytest.mark.slow
def test_real_runs_stopped_and_continued(make_recipe, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    steps = {"dir": "x", "steps": 60, "log_every": 1}
    recipe.write_text(make_recipe(engine={"precision": "fp32", "threads": 1, "micro_batch": 2}, run=steps).to_yaml())
    out = tmp_path / "out"
    command = [sys.executable, "-m", "maskmatch_scale", "sweep", str(recipe), "optim.lr=1e-4,1e30", "--out", str(out)]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    run = out / "optim.lr=1e-4"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean) as process:
        until = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode == 75, err
    (stopped,) = (run / "checkpoints").glob("step-*")
    assert 3 <= int(stopped.name.removeprefix("step-")) < 60
    assert not (out / "optim.lr=1e30").exists()

    done = subprocess.run(
        [*command, "--resume", "auto", "run.steps=64"], capture_output=True, text=True, check=False, env=clean
    )
    assert done.returncode == 1, done.stderr
    assert "best: optim.lr=1e-4, mIoU 0." in done.stdout
    assert "failed: loss not finite" in done.stdout
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 65))
