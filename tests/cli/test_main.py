"""The command line as a user meets it: one clear line, exit code 2, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from maskmatch_scale.cli import main as cli
from maskmatch_scale.errors import RESUMABLE, TrainingStopped, UserError
from maskmatch_scale.train import train


def run(capsys, monkeypatch, *arguments):
    """(exit code, stdout, stderr) of `maskmatch …` in this process."""
    monkeypatch.setattr(sys, "argv", ["maskmatch", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe().to_yaml())
    return file


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["method.treshold=0.9"], ["method.treshold", "did you mean method.threshold?"]),
        (["run.steps=many"], ['run.steps="many"']),
        (["data.root=nowhere"], ["data.root=nowhere", "no such folder"]),
        (["data.labelled_count=0"], ["data.labelled_count=0"]),
        (["data.labelled_count=9"], ["data.labelled_count=9", "there are 8 labelled samples"]),
        (["model.num_classes=2"], ["model.num_classes=2", "3 classes"]),
        (["data.crop_px=80"], ["data.crop_px=[80, 80]", "units of 32 px", "multiples of 32"]),
        (["method.mask.keep=0.01"], ["data.crop_px", "keep"]),
        (["model.backbone=timm/nonsense"], ["model:", "nonsense"]),
        (["model.backbone=transformers/nowhere"], ["model:", "nowhere"]),
        (["model.head=unet"], ["model.head"]),
        (["engine.precision=bf16"], ["engine.precision=bf16", "BatchNorm", "autocast-bf16"]),
        (["engine.precision=fp16", "model.head=linear"], ["engine.precision=fp16", "needs a GPU"]),
        (["engine.zero_stage=0", "engine.precision=bf16", "model.head=linear"], ["hidden optimizer step"]),
        (["engine.library=accelerate"], ["engine.zero_stage=1", "set engine.zero_stage=0"]),
        (["run.stop_signals=[SIGTERM, SIGKILL]"], ["run.stop_signals", "SIGKILL", "'SIGTERM', 'SIGINT'"]),
        (["run.max_hours=-1"], ["run.max_hours=-1"]),
        (["engine.deepspeed_json=nowhere.json"], ["engine.deepspeed_json=nowhere.json", "No such file"]),
    ],
)
def test_mistakes_in_a_recipe(capsys, monkeypatch, recipe_file, tmp_path, overrides, parts):
    code, _, err = run(capsys, monkeypatch, "train", recipe_file, *overrides)
    assert code == 2
    assert err.startswith("maskmatch: error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert not (tmp_path / "run").exists()


def test_lanes_that_do_not_fit_the_ranks(capsys, monkeypatch, recipe_file, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "9", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(capsys, monkeypatch, "train", recipe_file, "data.lanes=4")
    assert (code, "data.lanes=4 does not divide the 18 images that 9 ranks" in err) == (2, True)
    assert not (tmp_path / "run").exists()


def test_other_ranks_leave_the_message_to_the_first(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # a run in this process has set it
    monkeypatch.setattr(cli, "_run_has_started", lambda: False)
    code, _, err = run(capsys, monkeypatch, "train", tmp_path / "none.yaml")
    assert (code, err) == (2, "")
    # The first of another machine may be the only one that finds it.
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, _, err = run(capsys, monkeypatch, "train", tmp_path / "none.yaml")
    assert (code, err.startswith("maskmatch: error: rank 1: ")) == (2, True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cli, "_run_has_started", lambda: True)
    _, _, err = run(capsys, monkeypatch, "train", tmp_path / "none.yaml")
    assert err.startswith("maskmatch: error: rank 1: ")


def test_zero_labelled_samples(capsys, monkeypatch, recipe_file, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "empty")
    index = json.loads((root / "index.json").read_text())
    index["streams"]["labelled"]["shards"] = []
    (root / "index.json").write_text(json.dumps(index))
    code, _, err = run(capsys, monkeypatch, "train", recipe_file, f"data.root={root}")
    assert (code, "'labelled' has no samples" in err) == (2, True)


def test_an_index_that_does_not_match_its_shards(capsys, monkeypatch, recipe_file, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "cut")
    shard = next(root.glob("labelled-*3.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    code, _, err = run(capsys, monkeypatch, "train", recipe_file, f"data.root={root}")
    assert code == 2
    assert shard.name in err
    code, _, err = run(capsys, monkeypatch, "shards", "verify", root)
    assert code == 2
    assert shard.name in err


@pytest.mark.parametrize("command", ["", "train", "sweep", "evaluate", "report", "export", "doctor", "shards",
                                     "shards write", "shards verify", "shards show", "shards index",
                                     "shards merge"])  # fmt: skip
def test_help_has_an_example(capsys, monkeypatch, command):
    code, out, _ = run(capsys, monkeypatch, *command.split(), "--help")
    assert code == 0
    assert "Example:" in out


def test_evaluate_and_report_a_run(capsys, monkeypatch, make_recipe):
    folder = train(make_recipe(run={"steps": 1}))
    capsys.readouterr()
    code, out, _ = run(capsys, monkeypatch, "evaluate", folder, "--split", "val", "--json")
    (ema, student) = json.loads(out)
    assert (code, ema["weights"], student["weights"]) == (0, "ema", "student")
    code, out, _ = run(capsys, monkeypatch, "evaluate", folder, "--weights", "ema")
    assert code == 0
    assert all(word in out for word in ("square", "mIoU", "pixel accuracy"))
    assert "boundary" not in out
    code, out, _ = run(capsys, monkeypatch, "evaluate", folder, "--weights", "ema", "--locality")
    assert code == 0
    assert all(row in out for row in ("boundary IoU", "30% of units visible", "c ≥ 0.3"))
    kept = json.loads((folder / "evaluation" / "val-ema.json").read_text())["locality"]
    assert kept["small_objects"] > 0
    shutil.rmtree(folder / "pictures")
    whole = ("evaluation.mode=whole", "evaluation.flip=true", "evaluation.pictures=0")
    code, out, _ = run(capsys, monkeypatch, "evaluate", folder, "--weights", "ema", "--json", *whole)
    assert code == 0
    assert json.loads(out)[0]["inference"] == "whole images, and their mirror images"
    assert not (folder / "pictures").exists()
    for key, part in (("run.steps=3", "only keys of `evaluation`"), ("evaluation.overlap=1", "evaluation.overlap=1")):
        code, _, err = run(capsys, monkeypatch, "evaluate", folder, key)
        assert code == 2
        assert part in err
    code, out, _ = run(capsys, monkeypatch, "report", folder, "--json", folder / "table.json")
    assert code == 0
    assert {row["method"] for row in json.loads((folder / "table.json").read_text())} == {"MaskMatch"}
    assert "MaskMatch" in out
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    "arguments", [["evaluate", "nowhere"], ["report", "nowhere"], ["evaluate", "nowhere", "--weights", "best"],
                  ["shards", "write", "photographs", "out"], ["shards", "verify", "nowhere"]],
)  # fmt: skip
def test_mistakes_elsewhere(capsys, monkeypatch, arguments):
    code, _, err = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert err.startswith("maskmatch: error: ")
    assert err.count("\n") == 1


def test_help_imports_nothing_heavy():
    program = """
import sys
sys.argv = ["maskmatch", "--help"]
from maskmatch_scale.cli import main as cli
try:
    cli.main()
finally:
    assert not {"torch", "deepspeed", "timm", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def ended(error, monkeypatch, capsys, *arguments, **environment):
    """What the command does when a run ends with an error."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "app", lambda **_: (_ for _ in ()).throw(error))
    return run(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "my recipe.yaml", "run.steps=9"],
        ["train", "my recipe.yaml", "--resume", "elsewhere", "run.steps=9"],
        ["train", "--local_rank=0", "my recipe.yaml", "--resume=auto", "run.steps=9"],
    ],
)
def test_a_run_that_can_go_on_says_how(capsys, monkeypatch, tmp_path, arguments):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "code"
    error = TrainingStopped("got SIGTERM; stopped after step 4", RESUMABLE)
    code, _, err = ended(error, monkeypatch, capsys, *arguments, MASKMATCH_EXIT_CODE_FILE=str(file))
    again = "maskmatch train 'my recipe.yaml' run.steps=9 --resume auto"
    assert (code, err) == (75, f"maskmatch: stopped: got SIGTERM; stopped after step 4; go on with: {again}\n")
    assert file.read_text() == "75\n"
    code, _, _ = ended(UserError("wrong"), monkeypatch, capsys, *arguments)
    assert (code, file.read_text()) == (2, "75\n")  # the first has the reason
    os.utime(file, (1e9, 1e9))  # left by ranks that were there before these
    ended(UserError("wrong"), monkeypatch, capsys, *arguments)
    assert file.read_text() == "2\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


SIGNALLED = """
import os, signal, sys
from maskmatch_scale.cli import main as cli
class Finder:
    def find_spec(self, name, *_):
        if name == "maskmatch_scale.train":  # torch is about to be imported
            os.kill(os.getpid(), signal.SIGUSR1)
sys.meta_path.insert(0, Finder())
cli.main()
"""


def test_a_signal_while_libraries_are_imported(recipe_file, tmp_path):
    command = [sys.executable, "-c", SIGNALLED, "train", str(recipe_file)]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 75, done.stderr
    assert "maskmatch: stopped: got SIGUSR1 before the first step" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
