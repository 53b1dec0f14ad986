"""The benchmark of a build's memory: every case is measured on two ranks, and the limit is checked."""

import json
from pathlib import Path

import pytest

SMALL = {"embed_dim": 384, "depth": 8, "num_heads": 6}


@pytest.mark.slow
@pytest.mark.distributed
def test_rows_of_two_ranks(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks.building import __main__ as benchmark

    out = tmp_path / "building.json"
    options = ["--backbone", "timm/vit_tiny_patch16_224", "--backbone-options", json.dumps(SMALL)]
    benchmark.main(["--out", str(out), *options, "--image-size", "64"])  # so small a model says nothing about limits
    rows = json.loads(out.read_text())["rows"]
    assert [(row["start"], row["built"]) for row in rows] == [
        ("random", "whole"), ("random", "deferred"), ("file", "whole"), ("file", "deferred"),
    ]  # fmt: skip
    for row in rows:
        # Student and teacher, fp32, on two ranks; shards are padded.
        assert row["shard_mb"] == pytest.approx(row["parameters"] * 4 / 1e6, rel=0.01, abs=0.1)
        assert row["states_mb"] > row["shard_mb"] / 2
        assert row["block_mb"] > 0
        assert row["teacher_peak_mb"] > row["shard_mb"]
        assert row["limit_mb"] == pytest.approx(2 * row["shard_mb"] + row["block_mb"] + row["states_mb"], abs=0.3)
    assert out.with_suffix(".md").is_file()
