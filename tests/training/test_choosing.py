"""Whole runs on chosen samples: stopped and continued with the losses of a run that was not; mistakes in one line."""

import json
import sys

import pytest

from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback
from tests.data import foreign_shards
from tests.data.shards.test_second_labels import key, write_labels


@pytest.fixture
def recipe_of(make_recipe, tmp_path):
    """Labels from another folder than the images; unlabelled images chosen with an index and without."""
    foreign_shards.img2dataset(tmp_path / "images", (8,) * 4)
    write_labels(tmp_path / "labels", [[key(number) for number in range(0, 20, 2)]])
    labelled = [{"root": str(tmp_path / "images"), "labels": str(tmp_path / "labels"), "shards": "0-1"}]
    where = f"key > '{key(5)}' and width >= 128"
    unlabelled = [
        {"root": str(tmp_path / "images"), "where": where, "part": 0.5},
        {"shards": f"{tmp_path}/images/*.tar", "where": where, "name": "in sequence"},
    ]

    def made(name, **data):
        data = {
            "labelled": labelled,
            "unlabelled": unlabelled,
            "cache_dir": str(tmp_path / "cache"),
            "workers": 1,
        } | data
        run = {"dir": str(tmp_path / name), "steps": 8, "evaluate_every": 0, "log_every": 1}
        engine = {"micro_batch": 2, "precision": "fp32", "library": "accelerate", "zero_stage": 0}
        return make_recipe(data=data, engine=engine, method={"burn_in": 0.0, "scales": [1.0]}, run=run)

    return made


class StopsAfterThree(Callback):
    def after_step(self, done, figures):
        if done == 3:
            self.run.ask_to_stop("for a test", 75)


def losses(run):
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in found if record["kind"] == "train"}


def test_stopped_and_continued(recipe_of, tmp_path):
    whole = train(recipe_of("whole"))
    with pytest.raises(TrainingStopped):
        train(recipe_of("part"), callbacks=[StopsAfterThree])
    train(recipe_of("part"), "auto")
    assert losses(tmp_path / "part") == losses(whole)
    assert len(losses(whole)) == 8
    log = (whole / "log" / "rank-0.txt").read_text()
    assert "8 labelled samples, unlabelled ones of 4 shards of 'in sequence'" in log
    labels, where = tmp_path / "labels", f"where key > '{key(5)}' and width >= 128"
    for line in (
        f"labelled source 'labelled': 8 of 32 samples (shards 0-1, labels of {labels}), 8 images without a label map "
        f"in {labels}, 2 label maps without an image",
        f"unlabelled source 'unlabelled': 13 of 32 samples ({where}, part 0.5)",
        f"unlabelled source 'in sequence': 4 of 4 shards ({where})",
    ):
        assert line in log
    assert json.loads((whole / "summary.json").read_text())["fetched"]["left_out"] > 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{root: IMAGES, where: 'widht > 3'}", "none of 32 samples has a field 'widht'; there are key, width"),
        ("{root: IMAGES, where: 'width >'}", "where 'width >': at character 8: it ends too early"),
        ("{root: IMAGES, shards: 0-9}", "there is no shard 9; its index has 4 shards, numbered from 0 to 3"),
        ("{root: IMAGES, labels: LABELS}", "labels of unlabelled images are not read"),
    ],
)
def test_one_line_and_exit_code_2(recipe_of, tmp_path, capsys, monkeypatch, source, message):
    from maskmatch_scale.cli import main as cli

    (tmp_path / "recipe.yaml").write_text(recipe_of("run").to_yaml())
    changed = f"data.unlabelled=[{source.replace('IMAGES', str(tmp_path / 'images'))}]"
    monkeypatch.setattr(sys, "argv", ["maskmatch", "train", str(tmp_path / "recipe.yaml"), changed])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
