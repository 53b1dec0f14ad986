"""What all benchmarks share: clocks, counts, memory, and what a GPU can reach."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_both_clocks_and_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.harness import time_interleaved

    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) or time.sleep(0.01) for name in "ab"}
    timings = time_interleaved(variants, 2, torch.device("cpu"))
    assert (calls.count("a"), calls.count("b")) == (3, 3)
    for timing in timings.values():
        assert len(timing.seconds) == len(timing.wall) == 2
        assert timing.wall_minimum >= 0.01 > timing.minimum  # asleep: time passes, but none of the process's own
    calls.clear()
    time_interleaved(variants, 2, torch.device("cpu"), warmed_up=True)
    assert len(calls) == 4


def test_share_of_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.harness import gather_share

    rows, index = torch.randn(4096, 64), torch.randint(4096, (40_000,))
    cpu = torch.device("cpu")
    mostly, none = gather_share(lambda: rows.index_select(0, index), cpu), gather_share(lambda: rows @ rows.T, cpu)
    assert mostly is not None
    assert mostly > 0.5
    assert none == 0


def test_counts_a_grouped_convolution_and_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.harness import count_gmacs, peak_mb

    images = torch.zeros(2, 8, 10, 10, requires_grad=True)
    conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    macs = 2 * 8 * 100 * 9
    assert count_gmacs(lambda: conv(images)) * 1e9 == pytest.approx(macs)
    assert count_gmacs(lambda: conv(images).sum().backward()) * 1e9 == pytest.approx(3 * macs)

    def two_then_one() -> torch.Tensor:
        first, second = torch.zeros(250_000), torch.zeros(250_000)
        return first + second.shape[0]  # a third, while both are alive

    held = [torch.zeros(500_000)]
    assert peak_mb(two_then_one, held, torch.device("cpu")) == pytest.approx(5, abs=0.01)


def test_the_sources_are_named_by_their_own_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import harness

    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(harness, "_git", lambda *arguments: asked.append(arguments) or "0123abc")
    machine = harness.describe_machine(torch.device("cpu"), ["maskmatch_scale", "configs"])
    assert machine["sources"] == "maskmatch_scale 0123abc, configs 0123abc"
    assert ("rev-parse", "--short", "HEAD:maskmatch_scale") in asked
