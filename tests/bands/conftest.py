"""A data set of five bands of 12 bits in 16, its shards, and runs on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.recipe import Recipe
from maskmatch_scale.train import train
from tests.cli.test_main import run as command
from tests.conftest import TINY_SEGFORMER, TINY_VIT, draw_shapes, recipe_maker

rasterio = pytest.importorskip("rasterio")

NAMES = ("red", "green", "blue", "nir", "swir")
MODELS = {
    "vit": {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT},
    "segformer": {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER},
}


def draw_bands(seed: int) -> np.ndarray:
    """uint16 (5, 96, 128) of 0 to 4095: the colours of shapes, and two bands made of them."""
    rgb = draw_shapes(seed)[0].transpose(2, 0, 1).astype(np.uint16)
    return np.stack([*(rgb * 16), 4095 - rgb[0] * 8, rgb[1] * 10])


def write_tiff(path: Path, bands: np.ndarray, names: tuple[str, ...] = (), **options: object) -> Path:
    """A TIFF of interleaved bands (C, H, W), as GDAL writes it."""
    count, height, width = bands.shape
    size = {"count": count, "height": height, "width": width, "dtype": bands.dtype}
    with warnings.catch_warnings(action="ignore"), rasterio.open(path, "w", driver="GTiff", **size, **options) as file:
        file.write(bands)
        if names:
            file.descriptions = names
    return path


@pytest.fixture(scope="session")
def tiffs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `images` of 9 TIFFs, `labels` for 5 of them, and `classes.txt`."""
    root = tmp_path_factory.mktemp("tiffs")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for number in range(9):
        write_tiff(root / "images" / f"{number}.tif", draw_bands(number))
        if number < 5:
            Image.fromarray(draw_shapes(number)[1]).save(root / "labels" / f"{number}.png")
    (root / "classes.txt").write_text("ground\nsquare\ndisc\n")
    return root


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `maskmatch …` in this process."""
    return lambda *words: command(capsys, monkeypatch, *words)


@pytest.fixture(scope="session")
def bands(tiffs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of five bands, with a `dev`."""
    from typer.testing import CliRunner

    from maskmatch_scale.cli.main import app

    out = tmp_path_factory.mktemp("bands") / "shards"
    words = [
        "shards",
        "write",
        "folder",
        tiffs,
        out,
        "--classes",
        tiffs / "classes.txt",
        "--dev",
        "2",
        "--workers",
        "1",
    ]
    words += ["--bands", ",".join(NAMES), "--value-range", "0:4095"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def make_bands_recipe(bands: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """A small recipe on `bands`, with a run directory of its own; sections are merged over it."""

    def make(named: str = "vit", **sections: object) -> Recipe:
        maker = recipe_maker(bands, tmp_path_factory.mktemp("runs"))
        return maker(**({"model": MODELS[named]} | sections))

    return make


@pytest.fixture(scope="session")
def bands_runs(make_bands_recipe: Callable[..., Recipe]) -> Callable[[str], Path]:
    """Trains a run of one of MODELS for two steps, once."""
    done: dict[str, Path] = {}

    def give(model: str) -> Path:
        if model not in done:
            done[model] = train(make_bands_recipe(model, run={"steps": 2}))
        return done[model]

    return give
