"""Images of 20,000 × 20,000 px within 4 GB: the peak memory of the command's process, as the system counted it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.predict.environment import without_ranks

rasterio = pytest.importorskip("rasterio")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["tif", "png", "jpg"])
def test_an_image_of_20000_px_a_side_is_predicted_within_4_gb(export, tmp_path, capsys, ending):
    from benchmarks.large_images import FORMATS, SIDE_PX, WINDOW, peak_of

    path, out = tmp_path / f"large.{ending}", tmp_path / "out"
    FORMATS[ending](path)
    peak, _ = peak_of(without_ranks(), "predict", export, path, "--out", out, WINDOW)
    with capsys.disabled():
        sys.stderr.write(f"{ending}: peak {peak / 1e9:.2f} GB\n")
    assert peak < 4e9
    maps = "tif" if ending == "tif" else "png"
    with rasterio.open(out / "ids" / f"large.{maps}") as ids:
        assert (ids.height, ids.width) == (SIDE_PX, SIDE_PX)
    assert (out / "confidence" / f"large.{maps}").is_file()
    with Image.open(out / "overlay" / "large.jpg") as overlay:
        assert overlay.width == 4096
