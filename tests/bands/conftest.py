"""A data set of five bands of 12 bits in 16, its shards, and runs on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from maskmatch_scale.data.writing import write_shards
from maskmatch_scale.data.writing.sources.image_folder import image_folder
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.train import train
from tests.cli.test_main import run as command
from tests.conftest import TINY_SEGFORMER, TINY_VIT, recipe_maker
from tests.data.banded import NAMES, measured, write_geotiffs

rasterio = pytest.importorskip("rasterio")

MODELS = {
    "vit": {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT},
    "segformer": {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER},
}


def draw_bands(seed: int) -> np.ndarray:
    """uint16 (5, 96, 128)."""
    return measured(seed)[0]


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
    """`images` of 9 GeoTIFFs, `labels` of 5 of them, and `names.txt`."""
    root = tmp_path_factory.mktemp("tiffs")
    write_geotiffs(root, 9, 5)
    return root


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `maskmatch …` in this process."""
    return lambda *words: command(capsys, monkeypatch, *words)


@pytest.fixture(scope="session")
def bands(tiffs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of five bands, with a `dev`."""
    out = tmp_path_factory.mktemp("bands") / "shards"
    options = Options(classes=str(tiffs / "names.txt"), dev="2", bands=",".join(NAMES), value_range="0:4000")
    write_shards(image_folder(tiffs, options), out, workers=1, progress=False)
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
