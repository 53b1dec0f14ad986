"""What is made of a grid's results: statistics, plot, and the commit of what was run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from maskmatch_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_interval_of_a_paired_difference() -> None:
    from benchmarks.paired import paired_difference, t_975

    found = paired_difference({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0, 9: 7.0}, dict.fromkeys(range(5), 0.0))
    assert found is not None
    assert (found.mean, found.draws) == (3.0, 5)
    half = 2.776 * (2.5 / 5) ** 0.5
    assert (found.low, found.high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    one = paired_difference({4: 0.5}, {4: 0.25, 5: 1.0})
    assert (one.mean, one.low, one.high, one.draws) == (0.25, None, None, 1)  # type: ignore[union-attr]
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    for freedom, quantile in ((1, 12.706), (4, 2.776), (30, 2.042), (40, 2.0211), (120, 1.9799)):
        assert t_975(freedom) == pytest.approx(quantile, abs=2e-4)


def test_equal_cost_counts_the_burn_in(tmp_path: Path) -> None:
    from benchmarks.ablation.equal_cost import read_costs, run_cost, steps_for

    budget = run_cost(3.0, 1.0, 25, 100)
    assert budget == 25 * 1 + 75 * 3
    assert steps_for(budget, 3.0, 1.0, 25) == 100
    assert steps_for(budget, 1.0, 1.0, 25) == 250
    assert steps_for(budget, 4.0, 1.0, 25) == 25 + 56
    assert steps_for(10.0, 2.0, 1.0, 25) == 10  # within the burn-in
    rows = [{"arm": "supervised", "cpu_s": 1.0, "gmacs": 5.0}, {"arm": "fixmatch", "cpu_s": 2.0, "gmacs": 9.0}]
    (tmp_path / "cost.json").write_text(json.dumps({"rows": rows}))
    costs = read_costs(tmp_path / "cost.json")
    assert (costs.of("fixmatch"), costs.gmacs["fixmatch"]) == (2.0, 9.0)
    with pytest.raises(UserError, match="no cost of maskmatch"):
        costs.of("maskmatch")
    (tmp_path / "cost.json").write_text("[]")
    with pytest.raises(UserError, match=r"--cost .*cost\.json"):
        read_costs(tmp_path / "cost.json")


def test_the_commit_of_sources_is_found() -> None:
    from benchmarks.ablation import sources

    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("no checkout")
    changed = subprocess.run(["git", "status", "--porcelain", "maskmatch_scale"], cwd=ROOT, capture_output=True).stdout
    newest = sources._hash_at("HEAD")
    assert changed or newest == sources.sources_hash()
    commit = sources.commit_of(newest)
    assert commit is not None
    assert sources._hash_at(commit) == newest
    assert sources.commit_of("0" * sources.DIGITS) is None


def row_of_cell(arm: str, draw: int, curve: list[float], title: str, splits: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the plot and the figures read of a cell with a burn-in of 2 steps."""
    score = {"miou": curve[-1]}
    return {
        "arm": arm,
        "title": title,
        "group": "bases",
        "draw": draw,
        "splits": splits,
        "burn_in_steps": 2,
        "curve_images": 3,
        "curve": [{"step": step, "miou": miou} for step, miou in enumerate(curve, 1)],
        "results": {"equal steps": {"splits": dict.fromkeys(("dev", *splits), score)}},
    }


def test_spread_within_the_burn_in() -> None:
    from benchmarks.ablation.gather import Spread, spread_in_burn_in

    cells = [
        row_of_cell(arm, draw, [0.1, 0.2 + shift * (draw + 1), 0.9 * shift], arm)
        for arm, shift in (("supervised", 0.0), ("fixmatch", 0.01))
        for draw in (0, 1)
    ]
    assert spread_in_burn_in(cells) == Spread(2, pytest.approx(0.015), pytest.approx(0.02))  # type: ignore[arg-type]
    assert spread_in_burn_in(cells[:2]) is None
    assert spread_in_burn_in([{**cell, "burn_in_steps": 0} for cell in cells]) is None
    assert spread_in_burn_in([{**cell, "burn_in_steps": 1} for cell in cells]) is None  # alike to the last bit


def test_the_plot_names_its_split_and_baselines() -> None:
    from benchmarks.ablation.gather import difference_rows
    from benchmarks.ablation.plot import draw

    cells = [
        row_of_cell(arm, number, [0.1, 0.2], title)
        for arm, title in (("supervised", "supervised"), ("fixmatch", "FixMatch"), ("maskmatch", "MaskMatch"))
        for number in (0, 1)
    ]
    rows = difference_rows(cells)
    assert [(row["arm"], row["minus"]) for row in rows] == [
        ("fixmatch", "supervised"),
        ("maskmatch", "supervised"),
        ("supervised", "fixmatch"),
        ("maskmatch", "fixmatch"),
    ]
    curves = [{**point, **cell, "tmacs": 1.0, "cost_cpu_s": None} for cell in cells for point in cell["curve"]]
    figure = draw("grid", cells, rows, curves)
    labels = [panel.get_xlabel() for panel in figure.get_axes()]
    assert labels[0].startswith("mIoU on dev:")
    assert labels[1:3] == ["mIoU minus that of supervised", "mIoU minus that of FixMatch"]
    assert figure.get_axes()[3].get_ylabel() == "mIoU of the teacher on dev (3 images)"
    scored_at_the_end = draw("grid", cells, rows, [point for point in curves if point["step"] == 2])
    assert [panel.get_xlabel() for panel in scored_at_the_end.get_axes()] == labels[:3]
