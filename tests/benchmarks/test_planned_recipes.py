"""The heads of the recipes say what the planner's file says, and are rewritten by it."""

import json
from pathlib import Path

import pytest

from benchmarks import planned_recipes

ROWS = json.loads(planned_recipes.RESULTS.read_text(encoding="utf-8"))["rows"]


def of(path: Path) -> list[dict]:
    return [row for row in ROWS if row["recipe"] == str(path.relative_to(planned_recipes.ROOT))]


@pytest.mark.parametrize("path", planned_recipes.recipes(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_head_agrees_with_the_file(path):
    text = path.read_text(encoding="utf-8")
    assert of(path)
    assert planned_recipes.with_planned(text, of(path)) == text
    first = planned_recipes.head_lines(of(path))[1]
    assert text.count(first) == 1
    assert planned_recipes.with_planned(text.replace(first, first.replace("GPU-hours", "hours")), of(path)) == text


def test_every_size_of_a_head_is_in_the_file():
    for path in planned_recipes.recipes():
        sizes = planned_recipes.SIZES[path.stem]
        named = {sizes[0], *(name for name in planned_recipes.variants(path) if name in sizes)}
        assert {row["size"] for row in of(path)} == named


def test_lengths_are_those_of_the_splits():
    by_size = {(row["recipe"], row["size"]): row for row in ROWS}
    vit = by_size["configs/pascal/vit.yaml", "B"]
    assert vit["steps"] == -(-60 * 10_490 // 16)
    assert vit["gpu_hours"] == pytest.approx(vit["step_s"] * vit["steps"] * 4 / 3600)
    assert by_size["configs/cityscapes/segformer.yaml", "b5"]["steps"] == 40_000
    assert by_size["configs/pretraining/vit.yaml", "B"]["steps"] == -(-10_000_000 // 1024)


def test_an_output_that_is_no_json_is_refused(capsys, tmp_path):
    assert planned_recipes.main(["--out", str(tmp_path / "x.md")]) == 2
    assert "must end in .json" in capsys.readouterr().err
