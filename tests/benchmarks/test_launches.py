"""Counting of operations: views are free, sizes do not matter, and ours stay near the libraries' own."""

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks import launches

    return launches


def test_what_is_counted(launches):
    a = torch.empty(4, 8, device="meta")
    calls, gb = launches.count(lambda: (a.T, a.view(2, 16), a + 1))
    assert calls == 1  # neither transposing nor viewing launches anything
    assert gb == pytest.approx(2 * 4 * 32 / 1e9)
    # A convolution in a loop is counted as often as it runs.
    images = torch.empty(1, 3, 8, 8, device="meta")
    conv = torch.nn.Conv2d(3, 2, 1, device="meta")
    assert launches.count(lambda: [conv(images) for _ in range(5)])[0] == 5


def test_calls_do_not_grow_with_images_and_stay_near_the_libraries(launches, tmp_path):
    def counted(images):
        out = tmp_path / "launches.json"
        sizes = ["--images", str(images), "--image-size", "64", "--classes", "3"]
        assert launches.main(["--out", str(out), "--backbone", "transformers/segformer-b0", *sizes]) == 0
        return {row["part"]: row for row in json.loads(out.read_text())["rows"]}

    few, many = counted(2), counted(4)
    assert {part: row["calls"] for part, row in few.items()} == {part: row["calls"] for part, row in many.items()}
    assert all(row["calls_ratio"] <= 1.35 for row in many.values())
    assert launches.main(["--out", str(tmp_path / "x.txt")]) == 2


def test_a_teacher_makes_few_calls_more_than_the_library(launches):
    """At the recorded sizes, where full-resolution probabilities need several bands."""
    with launches.no_autocast():
        sizes = launches.SIDE_PX, launches.CLASSES, launches.IMAGES, launches.KEEP
        case = launches.Case("timm/vit_small_patch16_224", *sizes, torch.device("meta"))
        case.pseudo_label()  # makes the weights of upsampling, which later steps find
        ours, library = launches.count(case.pseudo_label)[0], launches.count(case.plain_pseudo_label)[0]
    assert ours <= 1.1 * library
