"""A run ends early when the teacher does not become better on `dev`: as after its last step, and it stays ended."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from maskmatch_scale.errors import UserError
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.recipe import RecipeError
from maskmatch_scale.record.report import write_report
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.record.summary import summarise
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback
from maskmatch_scale.training.callbacks.early_end import EarlyEnd
from maskmatch_scale.training.callbacks.evaluation import Evaluation
from tests.conftest import TINY_VIT
from tests.record.conftest import SUPERVISED, write_run

MODEL = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT}


def recipe_of(make_recipe, folder, **run):
    settings = {"steps": 8, "evaluate_every": 1, "checkpoint_every": 3, "keep_last": 9, "dir": str(folder)}
    method = {"base": "supervised", "mask": {"keep": None}}
    return make_recipe(model=MODEL, engine={"precision": "fp32"}, method=method, run=settings | run)


def scored(monkeypatch, values):
    """Let the evaluation after step s of the teacher find ``values[s - 1]``, and that of the student 0.1."""
    plain = Evaluation._evaluate_one

    def noted(self, done, weights):
        monkeypatch.setattr(ConfusionMatrix, "miou", lambda matrix: values[done - 1] if weights == "ema" else 0.1)
        plain(self, done, weights)

    monkeypatch.setattr(Evaluation, "_evaluate_one", noted)


def records(run, kind):
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


VALUES = (0.3, 0.5, 0.4, float("nan"), 0.5, 0.6, 0.7, 0.8)
"""The best is at step 2; three evaluations after it are no better, and the next one would be."""
END = {"step": 5, "best_step": 2, "best_miou": 0.5, "evaluations": 3}


def test_it_ends_as_after_the_last_step(make_recipe, tmp_path, monkeypatch, capsys):
    scored(monkeypatch, VALUES)
    run = train(recipe_of(make_recipe, tmp_path / "run", patience=3))
    assert [r["step"] for r in records(run, "train")] == [1, 2, 3, 4, 5]
    evaluated = [(r["step"], r["weights"]) for r in records(run, "eval")]
    assert evaluated == [(1, "ema"), (2, "ema"), (3, "ema"), (4, "ema"), (5, "ema"), (5, "student")]
    assert records(run, "early_end") == [{"kind": "early_end", **END}]
    assert json.loads((run / "summary.json").read_text())["ended_early"] == END
    assert (run / "checkpoints" / "latest").read_text() == "step-00000005"
    assert (run / "checkpoints" / "best").read_text().startswith("step-00000002 0.5")
    line = "step 5: the run ends early, after 3 evaluations without a better dev mIoU than 0.5000 at step 2"
    (shown,) = (shown for shown in capsys.readouterr().out.splitlines() if line in shown)
    assert shown.endswith(f"maskmatch evaluate {run}/checkpoints/best")
    summary = summarise(run)
    assert summary.finished
    assert summary.ended_early == "ended early at step 5: 3 evaluations without a better dev mIoU than 0.500 at step 2"
    assert summary.ended_early in write_report([run]).read_text()


def test_without_patience_it_goes_on(make_recipe, tmp_path, monkeypatch):
    scored(monkeypatch, VALUES)
    run = train(recipe_of(make_recipe, tmp_path / "run"))
    assert [r["step"] for r in records(run, "train")] == list(range(1, 9))
    assert "ended_early" not in json.loads((run / "summary.json").read_text())
    assert summarise(run).ended_early is None


def test_the_last_step_is_no_early_end(make_recipe, tmp_path, monkeypatch):
    scored(monkeypatch, (0.5, 0.4, 0.4))
    run = train(recipe_of(make_recipe, tmp_path / "run", steps=3, patience=2))
    assert records(run, "early_end") == []
    assert summarise(run).ended_early is None
    assert summarise(run).finished


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_run_that_continues_counts_on(make_recipe, tmp_path, monkeypatch, at):
    scored(monkeypatch, VALUES)
    whole = train(recipe_of(make_recipe, tmp_path / "whole", patience=3))
    recipe = recipe_of(make_recipe, tmp_path / "run", patience=3, checkpoint_every=1)

    class Kill(Callback):
        def before_step(self, step):
            if step == at:
                raise KeyboardInterrupt

    if at < 5:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, callbacks=[Kill])
    else:
        train(recipe)
    run = train(recipe, resume="auto")
    for kind, figures in (("train", ("step", "loss")), ("eval", ("step", "weights", "miou")), ("early_end", END)):
        found, expected = ([[r[name] for name in figures] for r in records(folder, kind)] for folder in (run, whole))
        assert found == expected
    assert json.loads((run / "summary.json").read_text())["ended_early"] == END
    more = train(recipe_of(make_recipe, tmp_path / "run", patience=4), resume="auto")
    assert [r["step"] for r in records(more, "train")] == list(range(1, 9))
    assert summarise(more).ended_early is None


def rank_of(number, of, folder, sent):
    """A run as `EarlyEnd` sees it, which continues from step 2 on one of several ranks."""

    def sum_over_ranks(own):
        sent.append(own)
        return own if number == 0 else own + sent[0]

    runtime = SimpleNamespace(rank=number, world_size=of, device=torch.device("cpu"), sum_over_ranks=sum_over_ranks)
    ends, said = [], []
    return SimpleNamespace(
        recipe=SimpleNamespace(run=SimpleNamespace(patience=3, steps=8)),
        runtime=runtime, start=2, folder=RunFolder(folder), ends=ends, end_early=ends.append, said=said,
        say=said.append, metrics=SimpleNamespace(write=lambda record: None),
    )  # fmt: skip


def test_ranks_count_alike_when_no_score_so_far_was_a_number(tmp_path):
    run = write_run(tmp_path / "run", method=SUPERVISED, steps=2)
    with (run / "metrics.jsonl").open("a") as file:
        for step in (1, 2):
            record = {"kind": "eval", "step": step, "split": "dev", "weights": "ema", "miou": float("nan")}
            file.write(json.dumps(record) + "\n")
    sent = []
    ranks = [rank_of(number, 2, run, sent) for number in range(2)]
    for rank in ranks:
        callback = EarlyEnd(rank)
        callback.started()
        assert rank.ends == []
        callback.evaluated({"step": 3, "split": "dev", "weights": "ema", "miou": float("nan")})
        assert rank.ends == [3]
        assert rank.said[0].startswith("step 3: the run ends early, after 3 evaluations without a better dev mIoU, nor")


def test_the_first_score_of_a_run_is_better_than_none_even_if_it_is_0(tmp_path):
    run = rank_of(0, 1, tmp_path, [])
    run.start = 0
    callback = EarlyEnd(run)
    callback.started()
    for step in (1, 2, 3):
        callback.evaluated({"step": step, "split": "dev", "weights": "ema", "miou": 0.0})
    assert run.ends == []  # two are no better than the first one
    callback.evaluated({"step": 4, "split": "dev", "weights": "ema", "miou": 0.0})
    assert run.ends == [4]
    assert "than 0.0000 at step 1" in run.said[0]


def test_an_evaluation_that_a_stop_left_out_ends_the_run_too(make_recipe, tmp_path, monkeypatch):
    scored(monkeypatch, VALUES)
    run = train(recipe_of(make_recipe, tmp_path / "run", patience=3))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if (r := json.loads(line))["kind"] != "early_end" and not _is_eval_of(r, 5)]
    (run / "metrics.jsonl").write_text("".join(kept))
    (run / "summary.json").unlink()
    train(recipe_of(make_recipe, tmp_path / "run", patience=3), resume="auto")
    assert [r["step"] for r in records(run, "train")] == [1, 2, 3, 4, 5]
    assert [r["weights"] for r in records(run, "eval") if r["step"] == 5] == ["ema", "student"]
    assert records(run, "early_end") == [{"kind": "early_end", **END}]


def _is_eval_of(record, step):
    return record["kind"] == "eval" and record["step"] == step


def test_it_needs_evaluations(make_recipe, tmp_path, shapes):
    with pytest.raises(RecipeError, match=r"run\.patience=2 with run\.keep_best=0: .* set run\.keep_best"):
        recipe_of(make_recipe, tmp_path / "run", patience=2, keep_best=0)
    with pytest.raises(RecipeError, match=r"run\.patience=2 with run\.evaluate_every=0: .* set run\.evaluate_every"):
        recipe_of(make_recipe, tmp_path / "run", patience=2, evaluate_every=0)
    root = shutil.copytree(shapes, tmp_path / "shapes")
    index = json.loads((root / "index.json").read_text())
    del index["streams"]["dev"]
    (root / "index.json").write_text(json.dumps(index))
    recipe = make_recipe(data={"root": str(root)}, run={"patience": 2})
    with pytest.raises(UserError, match=r"run\.patience=2: .* has no labelled split `dev`.*; leave it out"):
        train(recipe)
    assert not (tmp_path / "run").exists()
