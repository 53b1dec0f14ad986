"""Checkpoints of whole runs: when they are written, what is recorded, what is refused, and what may change."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from maskmatch_scale.checkpoints import parts, writing
from maskmatch_scale.checkpoints.finding import find, steps_in
from maskmatch_scale.checkpoints.layout import CheckpointError
from maskmatch_scale.errors import RESUMABLE, TrainingStopped
from maskmatch_scale.recipe import RecipeError
from maskmatch_scale.runs.model import open_run
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import evaluation
from maskmatch_scale.training.callbacks.checkpoints import Checkpoints
from tests.cli.test_main import run as command
from tests.conftest import TINY_VIT

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT}


def records(run, kind="checkpoint"):
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in found if record["kind"] == kind]


def losses(run):
    return [record["loss"] for record in records(run, "train")]


def files_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_each_has_a_record(make_recipe):
    run = train(make_recipe(run={"steps": 4, "checkpoint_every": 2, "evaluate_every": 0}))
    found = records(run)
    assert [record["step"] for record in found] == [2, 4]
    for record in found:
        assert record.keys() == {"step", "kind", "copy_s", "wait_s", "write_s", "bytes"}
        assert all(record[name] >= 0 for name in ("copy_s", "wait_s", "write_s"))
        assert record["bytes"] > 10_000
    summary = json.loads((run / "summary.json").read_text())
    assert summary["failed_saves"] == 0
    assert summary["checkpoint_wait_s"] == pytest.approx(sum(r["copy_s"] + r["wait_s"] for r in found))
    state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["model"]["backbone"] == "transformers/segformer-b0"
    assert state["model"]["classes"] == ["ground", "square", "disc"]
    assert (state["step"], state["world_size"], state["global_batch"], state["precision"]) == (4, 1, 2, "fp32")


@pytest.fixture
def scores(monkeypatch):
    """Evaluations have these results, one after the other."""
    wanted = []

    class Matrix(evaluation.ConfusionMatrix):
        def miou(self):
            return wanted.pop(0)

    monkeypatch.setattr(evaluation, "ConfusionMatrix", Matrix)
    return wanted


def test_the_best_evaluations_are_kept(make_recipe, scores):
    scores += [0.2, 0.6, 0.3, 0.5, 0.5]  # steps 1 to 4, at the end the student too
    run = train(make_recipe(run={"steps": 4, "checkpoint_every": 3, "evaluate_every": 1, "keep_last": 1}))
    # After steps 1 and 2 because of their scores, after step 3 because it is due.
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4]
    assert steps_in(run / "checkpoints").keys() == {2, 4}
    assert (run / "checkpoints" / "best").read_text() == "step-00000002 0.6\n"
    assert find(run / "checkpoints" / "best").step == 2


def test_the_one_that_a_run_continues_from_is_not_written_again(make_recipe):
    """The evaluation after it was broken off, and is made up for before the first step."""
    settings = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 2, "keep_best": 2}

    class BrokenOff(evaluation.Callback):
        def after_step(self, done, figures):
            if done == 2:  # the next images that the teacher gets are those of the evaluation
                ask = self.run.ask_to_stop
                self.run.teacher.module.register_forward_pre_hook(lambda *_: ask("enough", RESUMABLE))

    class Look(evaluation.Callback):
        def before_step(self, step):
            seen.append((folder / "index.json").stat().st_ino)

    recipe = make_recipe(run=settings)
    folder = Path(recipe.run.dir) / "checkpoints" / "step-00000002"
    with pytest.raises(TrainingStopped, match="enough; stopped after step 2"):
        train(recipe, callbacks=[BrokenOff])
    assert records(Path(recipe.run.dir), "eval") == []
    before, seen = (folder / "index.json").stat().st_ino, []
    run = train(recipe, "auto", callbacks=[Look])
    assert seen == [before] * 2
    assert [record["step"] for record in records(run)] == [2, 4]
    assert "step-00000002" in (run / "checkpoints" / "best").read_text()


@pytest.mark.parametrize("best", [False, True])
def test_rank_0_says_which_are_the_best(best):
    """It alone knows the scores: a rank that saves alone would wait for the others."""
    saved = []

    class Rank1(Checkpoints):
        def _save(self, done):
            saved.append(done)

    own = []
    run = SimpleNamespace(
        resumed={}, start=0, keeper=None, recipe=SimpleNamespace(run=SimpleNamespace(keep_best=1)),
        runtime=SimpleNamespace(
            device=torch.device("cpu"), sum_over_ranks=lambda flag: own.append(int(flag)) or flag + int(best)
        ),
    )  # fmt: skip
    Rank1(run).evaluated({"split": "dev", "weights": "ema", "step": 3, "miou": 0.5})
    assert own == [0]
    assert saved == [3] * best


def test_no_score_is_the_best(make_recipe, scores):
    scores += [float("nan")] * 3
    run = train(make_recipe(run={"steps": 2, "checkpoint_every": 0, "evaluate_every": 1}))
    assert [record["step"] for record in records(run)] == [2]


def test_keeping_nothing_is_refused(make_recipe):
    with pytest.raises(RecipeError, match=r"run\.keep_last=0, run\.keep_every=0 and run\.keep_best=0"):
        make_recipe(run={"keep_last": 0, "keep_best": 0})


@pytest.fixture
def full(monkeypatch):
    """From the number of the checkpoint in this list on, the disk is full."""
    since, count = [1], []
    write_part = parts.write_part

    def write(path, pieces):
        count.append(1)
        if len(count) < since[0]:
            return write_part(path, pieces)
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(writing, "write_part", write)
    return since


def test_training_goes_on_for_some_failed_ones(make_recipe, full):
    full[0] = 2
    recipe = make_recipe(run={"steps": 9, "checkpoint_every": 1, "evaluate_every": 0, "max_failed_saves": 3})
    with pytest.raises(TrainingStopped, match=r"3 checkpoints in a row .*max_failed_saves=3.*No space left") as error:
        train(recipe)
    assert "--resume" in str(error.value)
    assert "step-00000001" in str(error.value)
    run = Path(recipe.run.dir)
    assert steps_in(run / "checkpoints").keys() == {1}
    found = records(run)
    # The third failure is known when the next one begins, and the run takes no further step.
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    assert ["No space left on device" in record.get("error", "") for record in found] == [False, True, True, True, True]
    assert len(losses(run)) == 5
    assert "step 2: the checkpoint could not be written" in (run / "log" / "rank-0.txt").read_text()


def test_a_failed_one_at_the_end_is_a_failed_run(capsys, monkeypatch, make_recipe, full, tmp_path):
    recipe = make_recipe(run={"steps": 2, "checkpoint_every": 0, "evaluate_every": 0})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    code, _, err = command(capsys, monkeypatch, "train", tmp_path / "recipe.yaml")
    assert code == 1
    assert err.splitlines()[-1].startswith("maskmatch: error: the checkpoint of step 2 could not be written: rank 0 on")
    assert not (Path(recipe.run.dir) / "summary.json").exists()


@pytest.mark.parametrize("named", ["auto", "run", "checkpoint"])
def test_a_damaged_newest_one(make_recipe, tmp_path, named):
    settings = {"checkpoint_every": 2, "evaluate_every": 0}
    run = train(make_recipe(run=settings | {"steps": 4}))
    newest = run / "checkpoints" / "step-00000004"
    part = next(newest.glob("part-*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    before = files_in(run)
    resume = {"auto": "auto", "run": str(run), "checkpoint": str(newest)}[named]
    if named == "checkpoint":
        with pytest.raises(CheckpointError, match=f"{newest}: {part.name} is damaged"):
            train(make_recipe(run=settings | {"steps": 6}), resume)
        assert files_in(run) == before
        return
    train(make_recipe(run=settings | {"steps": 6}), resume)
    log = (run / "log" / "rank-0.txt").read_text()
    assert f"passed over: {newest}: {part.name} is damaged" in log
    assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert find(run).folder.name == "step-00000006"


REFUSED = {
    "another backbone": ({"model": VIT}, "backbone transformers/segformer-b0, this run has timm/vit_tiny"),
    "another head": ({"model": {"head": "pixel_shuffle"}}, "head segformer, this run has pixel_shuffle"),
    "more classes": ({"model": {"num_classes": 5}}, "number of classes 3, this run has 5"),
    "no mask": ({"method": {"mask": {"keep": None}}}, "context."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused_before_anything_changes(capsys, monkeypatch, make_recipe, tmp_path, name):
    run = train(make_recipe(run={"steps": 1, "evaluate_every": 0}))
    sections, message = REFUSED[name]
    if "model" in sections and "backbone" not in sections["model"]:
        sections = {"model": dict(make_recipe().model) | sections["model"]}
    recipe = make_recipe(run={"steps": 2}, **sections)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    before = files_in(run)
    code, _, err = command(capsys, monkeypatch, "train", tmp_path / "recipe.yaml", "--resume", "auto")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert len(err) < 700
    assert files_in(run) == before


@pytest.mark.parametrize("where", ["empty", "foreign", "nowhere"])
def test_what_is_no_checkpoint_is_refused_before_anything_changes(capsys, monkeypatch, make_recipe, tmp_path, where):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("")
    (tmp_path / "recipe.yaml").write_text(make_recipe().to_yaml())
    before = files_in(tmp_path)
    code, _, err = command(capsys, monkeypatch, "train", tmp_path / "recipe.yaml", "--resume", tmp_path / where)
    assert code == 2
    what = "no such run or checkpoint" if where == "nowhere" else "there is no complete checkpoint here"
    assert f"{where}: {what}" in err
    assert err.count("\n") == 1
    assert files_in(tmp_path) == before


def test_a_renamed_checkpoint_is_continued(make_recipe, tmp_path):
    settings = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 0}
    whole = train(make_recipe(run=settings | {"dir": str(tmp_path / "whole")}))
    shutil.move(whole / "checkpoints" / "step-00000002", tmp_path / "best")
    recipe = make_recipe(run=settings | {"dir": str(tmp_path / "part")})
    assert losses(train(recipe, str(tmp_path / "best"))) == losses(whole)[2:]
    # It is also a start, wherever it lies.
    model = dict(make_recipe().model) | {"pretrained": str(tmp_path / "best")}
    train(make_recipe(model=model, run={"steps": 1, "dir": str(tmp_path / "new"), "evaluate_every": 0}))


ENGINES = [
    {"zero_stage": 3},
    {"zero_stage": 0, "library": "accelerate"},
    {"zero_stage": 2, "precision": "autocast-bf16"},
]


def test_another_engine_or_stage_continues(make_recipe, tmp_path):
    settings = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 0, "keep_last": 3}
    engine = {"micro_batch": 2, "precision": "fp32"}

    def recipe(name, **changed):
        return make_recipe(model=VIT, engine=engine | changed, run=settings | {"dir": str(tmp_path / name)})

    whole = train(recipe("whole", zero_stage=1))
    for number, changed in enumerate(ENGINES):
        run = train(recipe(f"part-{number}", **changed), str(whole / "checkpoints" / "step-00000002"))
        tolerance = 1e-6 if "precision" not in changed else 0.05
        assert losses(run) == pytest.approx(losses(whole)[2:], rel=tolerance), changed
        log = (run / "log" / "rank-0.txt").read_text()
        assert "continued from step 2 with" in log
        assert "(was 1)" in log
    # And back.
    back = train(recipe("back", zero_stage=1), str(tmp_path / "part-0" / "checkpoints" / "step-00000004"))
    assert losses(back) == pytest.approx(losses(whole)[4:], rel=1e-6)


def test_another_global_batch_is_told(make_recipe, tmp_path):
    settings = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 0}
    whole = train(make_recipe(run=settings))
    part = make_recipe(engine={"micro_batch": 3, "accumulation": 2}, run=settings | {"dir": str(tmp_path / "part")})
    run = train(part, str(whole / "checkpoints" / "step-00000002"))
    assert "a step takes 6 labelled images instead of 2" in (run / "log" / "rank-0.txt").read_text()


def test_a_checkpoint_of_an_older_version_is_a_start_only(make_recipe, tmp_path):
    """It had whole weights beside the engine's own files."""
    from safetensors.torch import save_file

    run = train(make_recipe(run={"steps": 1, "evaluate_every": 0, "dir": str(tmp_path / "old")}))
    folder = run / "checkpoints" / "step-00000001"
    teacher = open_run(run, "ema")[1].state_dict()
    for path in [*folder.glob("part-*"), folder / "index.json"]:
        path.unlink()
    (folder / "engine").mkdir()
    save_file({name: value.contiguous() for name, value in teacher.items()}, folder / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"before checkpoints had a format.*model\.pretrained"):
        train(make_recipe(run={"steps": 2, "dir": str(run)}), "auto")
    started = []

    class Look(evaluation.Callback):
        def started(self):
            started.append({name: value.clone() for name, value in self.run.teacher.module.state_dict().items()})

    for start in (run, folder):
        model = dict(make_recipe().model) | {"pretrained": str(start)}
        train(make_recipe(model=model, run={"steps": 1, "evaluate_every": 0}), callbacks=[Look])
        assert all(torch.equal(started[-1][name], value) for name, value in teacher.items())
