"""The quickstart's table: means over seeds, paired differences, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def row(method: str, seed: int, miou: float) -> dict[str, object]:
    return {"backbone": "vit", "method": method, "split": "val", "seed": seed, "miou": miou, "cpu_s": 10.0 + seed}


def test_means_and_paired_differences_over_seeds() -> None:
    from benchmarks.quickstart import summary_of

    rows = [row("supervised", seed, 0.5 + seed / 10) for seed in (0, 1, 2)]
    rows += [row("FixMatch", seed, 0.5 + seed / 10 + gain) for seed, gain in ((2, 0.03), (0, 0.01), (1, 0.02))]
    means, differences = summary_of(rows)
    assert [(mean["method"], mean["seeds"], round(mean["miou"], 9)) for mean in means] == [
        ("supervised", 3, 0.6),
        ("FixMatch", 3, 0.62),
    ]
    assert means[1]["miou of each seed"] == "0.510 0.620 0.730"
    [difference] = differences
    assert (difference["method"], difference["minus"], difference["seeds"]) == ("FixMatch", "supervised", 3)
    assert difference["difference"] == pytest.approx(0.02)
    # Student's t with two degrees of freedom, a standard deviation of 0.01.
    assert difference["high"] - difference["low"] == pytest.approx(2 * 4.303 * 0.01 / 3**0.5)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.quickstart import main

    with pytest.raises(SystemExit) as ended:
        main(["--runs", str(tmp_path), "--out", str(tmp_path / "out.json")])
    assert ended.value.code == 2
    assert "no finished run there" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
