"""The scaling model: its formulas against others, a small case from its traces to its page, and one measured run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.scaling_model import __main__, archive, cases, doc, failures, measure, report, steps
from maskmatch_scale.planning.build import build
from maskmatch_scale.planning.hardware import gpu_named


@pytest.mark.parametrize(("cost", "between"), [(0.1, 4.5e4), (30.0, 1.8e5), (600.0, 4.0e4)])
def test_the_interval_is_the_one_that_loses_least(cost, between):
    candidates = np.geomspace(cost, between, 20_000)
    # Daly's model without approximations: failures at random, each costs what was done since the last checkpoint.
    wall = between * (np.exp((candidates + cost) / between) - 1) / candidates
    best = candidates[np.argmin(wall)]
    assert failures.interval_s(cost, between) == pytest.approx(best, rel=0.02)


def test_failures_of_the_llama_3_report():
    assert failures.hours_between_failures(16_384) == pytest.approx(54 * 24 / 419)
    assert failures.hours_between_failures(1) == pytest.approx(50_677, rel=1e-3)


def test_a_checkpoint_is_not_begun_before_the_last_one_is_complete():
    (row,) = failures.rows([{"model": "x", "parameters": 7_000_000_000, "gpus": 4096, "step_s": 1.0}])
    assert row["checkpoint_gb"] == 112
    assert row["write_s"] == pytest.approx(failures.CLOSING_S + 112 / 100)
    assert row["interval_s"] >= row["write_s"]
    assert 0 < row["lost"] <= row["lost_at_1000_steps"] + 1e-9


def test_a_billion_images_by_the_measured_million_shards():
    scale = json.loads((archive.ROOT / "benchmarks/results/scale.json").read_text())
    (row,) = [row for row in archive.shards() if row["samples_a_shard"] == 1_000]
    assert row["shards"] == scale["machine"]["shards"] == 1_000_000
    assert row["table_mb"] == scale["machine"]["table_mb"]


@pytest.fixture(scope="module")
def small():
    """A tiny ViT at every stage."""
    case = cases.Case("tiny", "timm/test_vit2", 64, 2)
    return list(steps.planned([case]))


def test_stages_share_one_trace_and_differ_in_traffic(small):
    first, second, third = small
    assert first.subject is third.subject
    assert first.step(1).network == ()
    sent = [sum(one.sent_bytes for one in plan.step(16).network) for plan in (first, second, third)]
    assert sent[0] < sent[2] < sent[1]  # of three views; at stage 2 each one is reduced to every rank
    once, twice = (sum(one.sent_bytes for one in third.step(16, n).network) for n in (1, 2))
    assert twice > 1.5 * once


def test_scaling_of_a_small_case(small):
    rows = steps.weak(small[0])
    assert [row["gpus"] for row in rows] == list(cases.GPUS)
    assert rows[0]["efficiency"] == 1
    assert all(a["efficiency"] >= b["efficiency"] for a, b in zip(rows, rows[1:]))
    strong = [row for row in steps.strong(small[0]) if row["batch"] == 1024]
    assert [row["gpus"] for row in strong] == [1, 8, 16, 64, 256]
    assert all(row["accumulation"] * row["gpus"] * 2 == 1024 for row in strong)
    assert strong[1]["speedup"] == pytest.approx(8, rel=0.5)


def test_the_network_alone_is_compared(tmp_path):
    subjects = {1: build(measure.recipe_of(tmp_path, 1, "run"), gpu_named("h100")).subject}
    traffic = measure.step_traffic(subjects[1], 2)
    sent = 2 * sum(one.sent(2) for one in traffic) / 1e6
    rows = [
        {"ranks": 2, "zero_stage": 1, "link_mbit": link, "step_s": 1 + sent * 8 / link if link else 1, "sent_mb": sent}
        for link in (None, 1000, 200)
    ]
    fast, slow = measure.compare(rows, subjects)
    assert fast["predicted_step_s"] is None
    assert slow["bytes_error"] == pytest.approx(0)
    assert slow["step_error"] == pytest.approx(0, abs=1e-6)


def test_the_page_and_the_plot_have_no_empty_part(small, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "CASES", (small[0].case,))
    monkeypatch.setattr(__main__, "CASES", (small[0].case,))
    out = tmp_path / "model.json"
    assert __main__.main(["--out", str(out), "--no-measure"]) == 0
    found = json.loads(out.read_text())
    assert {row["zero_stage"] for row in found["rows"]} == {1, 2, 3}
    assert all(found[name] for name in ("rows", "strong", "failures", "shards", "demand"))
    text = out.with_suffix(".md").read_text()
    assert "Not measured in this run." in text
    assert text.count("| tiny |") == sum(len(found[name]) for name in ("rows", "strong", "failures", "demand"))
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_no_curve_is_cut_off():
    found = json.loads((archive.ROOT / "benchmarks/results/scaling_model.json").read_text(encoding="utf-8"))
    found["rows"].append(found["rows"][0] | {"efficiency": 1.4})
    for axis in report.draw(found).axes:
        bottom, top = axis.get_ylim()
        for line in axis.lines:
            assert bottom <= min(line.get_ydata()) <= max(line.get_ydata()) <= top, axis.get_title()


@pytest.mark.slow
@pytest.mark.skipif(measure.reason_not() is not None, reason=f"links cannot be shaped: {measure.reason_not()}")
def test_two_ranks_over_a_slow_link_send_what_is_predicted(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RANKS", (2,))
    monkeypatch.setattr(measure, "STAGES", (1,))
    monkeypatch.setattr(measure, "LINKS_MBIT", (1000,))
    (row,) = measure.measure(tmp_path)
    subjects = {1: build(measure.recipe_of(tmp_path, 1, "run"), gpu_named("h100")).subject}
    (compared,) = measure.compare([row], subjects)
    assert abs(compared["bytes_error"]) < 0.02


def test_the_tables_of_the_page_are_those_of_the_results():
    found = json.loads((archive.ROOT / "benchmarks/results/scaling_model.json").read_text(encoding="utf-8"))
    page = (archive.ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert doc.with_tables(page, found) == page
    assert page.count("<!-- scaling_model: ") == 7
    assert doc.with_tables(page.replace(" GB |", " MB |"), found) == page
