"""The benchmark of a whole step: both steps compute the same, and the files say what they should."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks.train_step.__main__ import main

    return main


def test_both_steps_agree_and_are_broken_down(main, tmp_path):
    out = tmp_path / "step.json"
    backbones = ["transformers/segformer-b0", "timm/vit_tiny_patch16_224"]
    options = ["--image-size", "64", "--classes", "3", "--images", "2", "--keep", "0.5", "--repeats", "1"]
    assert main(["--out", str(out), "--backbone", *backbones, *options]) == 0
    result = json.loads(out.read_text())
    for backbone in backbones:
        ours, theirs = (row for row in result["rows"] if row["backbone"] == backbone)
        assert (ours["step"], theirs["step"]) == ("ours", "straightforward")
        # The same weights and views: what the teacher says, and the losses on it.
        assert ours["labels_differ"] < 1e-3
        assert ours["loss_x_differs"] < 1e-5
        assert ours["loss_u_differs"] < 1e-5
        # Half of one of the three student views is dropped.
        assert 1.05 < ours["limit"] < 1.3
        assert ours["efficiency"] == pytest.approx(ours["speedup"] / ours["limit"])
        parts = {part["part"] for part in result["parts"] if part["backbone"] == backbone}
        assert {"teacher, three scales", "masked view", "of it: context decoder"} <= parts
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "Where the time goes" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--images", "0"], "--images: 0"), (["--keep", "0.001"], "keep: 0.001"), (["--image-size", "100"], "100×100"),
     (["--backbone", "timm/resnet50"], "resnet50"), (["--device", "tpu"], "tpu")],
)  # fmt: skip
def test_mistakes_are_one_line(main, tmp_path, capsys, options, named):
    out = tmp_path / "step.json"
    assert main(["--out", str(out), "--backbone", "timm/vit_tiny_patch16_224", *options]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not out.exists()
