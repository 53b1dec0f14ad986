"""The null case: the colour of a pixel says its class, and the shards can be trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_nearest_colour_is_the_class() -> None:
    from benchmarks.ablation.colours import COLOURS, draw

    image, label = draw((0, 3))
    apart = ((image[:, :, None].astype(float) - np.array(list(COLOURS.values()))) ** 2).sum(-1)
    assert (apart.argmin(-1) == label).mean() > 0.9999
    assert set(np.unique(label)) == set(range(len(COLOURS)))
    assert not np.array_equal(draw((1, 3))[1], label)  # another stream has other images


def test_its_shards_are_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.ablation import colours
    from benchmarks.ablation.tasks import check_streams

    monkeypatch.setattr(colours, "COUNTS", {"labelled": 2, "unlabelled": 2, "dev": 1, "val": 1})
    assert colours.main([str(tmp_path / "shards")]) == 0
    check_streams("colours", tmp_path / "shards", ["val"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "labelled-000000.tar").write_bytes(b"x")
    assert colours.main([str(tmp_path / "full")]) == 2
    assert "error: " in capsys.readouterr().err
