"""The benchmark from end to end: memory that is planned is that of a real step of two ranks, at every stage."""

import json

import pytest

from benchmarks.plan_vs_measured.__main__ import main
from benchmarks.plan_vs_measured.cases import CROPS_PX, KEEPS, STAGES, cases


def test_every_stage_has_every_crop_and_keep():
    for family in ("vit", "segformer"):
        grid = [
            case for case in cases() if case.family == family and not case.checkpointing and case.precision == "fp32"
        ]
        for stage in STAGES:
            assert {case.crop_px for case in grid if case.stage == stage} == set(CROPS_PX)
            assert {case.keep for case in grid if case.stage == stage} == set(KEEPS)


@pytest.mark.slow
@pytest.mark.distributed
def test_planned_memory_is_that_of_real_steps(tmp_path):
    assert main(["--out", str(tmp_path / "found.json"), "--quick"]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {(row["family"], row["stage"]) for row in rows} == {
        (family, stage) for family in ("vit", "segformer") for stage in STAGES
    }
    for row in rows:
        # A process may hold one more copy of the model from the case before (docs/planning.md).
        assert 0.85 < row["planned_peak_mb"] / row["peak_mb"] < 1.1, row
        assert row["planned_s"] > 0
    assert "| family |" in (tmp_path / "found.md").read_text()
