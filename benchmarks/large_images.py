"""Peak memory of `maskmatch predict` on an image of 20,000 × 20,000 px, by the format of its file.

    python -m benchmarks.large_images --model exports/mine --out benchmarks/results/large_images.json

The image is made of slopes and stripes: its contents do not matter. Each format is predicted by the command in a
process of its own, on one CPU thread, in windows of 512 px; the peak is the largest resident size as the system counted
it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import check_out, describe_machine, markdown, say, write_json
from maskmatch_scale.errors import UserError
from maskmatch_scale.export.opening import open_model

COLUMNS = ("format", "classes", "parameters_m", "file_mb", "peak_gb", "cpu_s")
SIDE_PX = 20_000
WINDOW = "evaluation.window_px=512"
_COMMAND = "import sys; from maskmatch_scale.cli.main import main; sys.argv[0] = 'maskmatch'; main()"


def band(top: int, rows: int) -> NDArray[np.uint8]:
    """Some rows of the image: uint8 (rows, SIDE_PX, 3)."""
    y, x = np.mgrid[top : top + rows, :SIDE_PX]
    return np.stack([(x // 79) % 256, (y // 79) % 256, 255 * ((x // 500 + y // 700) % 2)], axis=2).astype(np.uint8)


def write_tiff(path: Path) -> None:
    """Write the image as a GeoTIFF in tiles."""
    where = rasterio.transform.from_origin(400_000, 5_800_000, 0.2, 0.2)
    shape = {"height": SIDE_PX, "width": SIDE_PX, "count": 3, "dtype": "uint8"}
    with rasterio.open(
        path, "w", driver="GTiff", tiled=True, compress="deflate", transform=where, crs="EPSG:25833", **shape
    ) as file:
        for top in range(0, SIDE_PX, 256):
            rows = band(top, min(256, SIDE_PX - top))
            file.write(rows.transpose(2, 0, 1), window=((top, top + len(rows)), (0, SIDE_PX)))


def write_png(path: Path) -> None:
    """Write the image as a PNG."""
    Image.fromarray(_whole()).save(path, compress_level=1)


def write_jpeg(path: Path) -> None:
    """Write the image as a JPEG."""
    Image.fromarray(_whole()).save(path, quality=90)


def _whole() -> NDArray[np.uint8]:
    return np.concatenate([band(top, 500) for top in range(0, SIDE_PX, 500)])


FORMATS: dict[str, Callable[[Path], None]] = {"tif": write_tiff, "png": write_png, "jpg": write_jpeg}
"""By the ending of the file."""


def peak_of(environment: Mapping[str, str], *arguments: object) -> tuple[int, float]:
    """Run `maskmatch …`: the largest resident size of its process in bytes, and its CPU seconds.

    Raises:
        RuntimeError: it ended with an error.
    """
    words = [sys.executable, "-c", _COMMAND, *map(str, arguments)]
    child = os.posix_spawn(sys.executable, words, dict(environment) | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"maskmatch {' '.join(map(str, arguments))}: exit code {code}")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def measure(model: Path, formats: Sequence[str], work: Path) -> Iterator[dict[str, Any]]:
    """One row for each format."""
    opened = open_model(model)
    parameters = sum(parameter.numel() for parameter in opened.segmenter.parameters())
    for ending in formats:
        path = work / f"large.{ending}"
        FORMATS[ending](path)
        peak, cpu_s = peak_of(os.environ, "predict", model, path, "--out", work / ending, WINDOW)
        say(f"{ending}: peak {peak / 1e9:.2f} GB")
        yield {
            "format": ending,
            "classes": opened.segmenter.num_classes,
            "parameters_m": parameters / 1e6,
            "file_mb": path.stat().st_size / 1e6,
            "peak_gb": peak / 1e9,
            "cpu_s": cpu_s,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a run, or an export")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a Markdown table goes beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        check_out(options.out)
        machine = describe_machine(torch.device("cpu"), ["maskmatch_scale"])
        with tempfile.TemporaryDirectory() as work:
            rows = list(measure(options.model, options.formats, Path(work)))
    except (UserError, ValueError) as error:
        say(f"error: {error}")
        sys.exit(2)
    write_json(options.out, machine, rows)
    title = f"predicting an image of {SIDE_PX} × {SIDE_PX} px: peak memory of the process"
    options.out.with_suffix(".md").write_text(markdown(title, machine, rows, COLUMNS), encoding="utf-8")


if __name__ == "__main__":
    main()
