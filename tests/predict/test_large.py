"""Images of 20,000 × 20,000 px within 4 GB: the peak memory of the command's process, as the system counted it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.predict.environment import without_ranks

rasterio = pytest.importorskip("rasterio")

SIDE = 20_000
_COMMAND = "import sys; from maskmatch_scale.cli.main import main; sys.argv[0] = 'maskmatch'; main()"


def band(top: int, rows: int) -> np.ndarray:
    """Some rows of a picture of slopes and stripes: uint8 (rows, SIDE, 3)."""
    y, x = np.mgrid[top : top + rows, :SIDE]
    return np.stack([(x // 79) % 256, (y // 79) % 256, 255 * ((x // 500 + y // 700) % 2)], axis=2).astype(np.uint8)


def write_tiff(path: Path) -> None:
    where = rasterio.transform.from_origin(400_000, 5_800_000, 0.2, 0.2)
    shape = {"height": SIDE, "width": SIDE, "count": 3, "dtype": "uint8"}
    with rasterio.open(
        path, "w", driver="GTiff", tiled=True, compress="deflate", transform=where, crs="EPSG:25833", **shape
    ) as file:
        for top in range(0, SIDE, 256):
            rows = band(top, min(256, SIDE - top))
            file.write(rows.transpose(2, 0, 1), window=((top, top + len(rows)), (0, SIDE)))


def write_png(path: Path) -> None:
    pixels = np.concatenate([band(top, 500) for top in range(0, SIDE, 500)])
    Image.fromarray(pixels).save(path, compress_level=1)


def peak_bytes(*arguments: object) -> int:
    """Runs `maskmatch …` and gives the largest resident size of its process."""
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", _COMMAND, *map(str, arguments)],
        without_ranks() | {"OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "write"), [("tif", write_tiff), ("png", write_png)])
def test_an_image_of_20000_px_a_side_is_predicted_within_4_gb(export, tmp_path, capsys, ending, write):
    path, out = tmp_path / f"large.{ending}", tmp_path / "out"
    write(path)
    peak = peak_bytes("predict", export, path, "--out", out, "evaluation.window_px=512")
    with capsys.disabled():
        sys.stderr.write(f"{ending}: peak {peak / 1e9:.2f} GB\n")
    assert peak < 4e9
    with rasterio.open(out / "ids" / f"large.{ending}") as ids:
        assert (ids.height, ids.width) == (SIDE, SIDE)
    assert (out / "confidence" / f"large.{ending}").is_file()
    with Image.open(out / "overlay" / "large.jpg") as overlay:
        assert overlay.width == 4096
