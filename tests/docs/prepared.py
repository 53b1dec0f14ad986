"""The data that pages of the documentation speak of, small: `<!-- page test: prepare NAME -->`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.data.writing import write_shards
from maskmatch_scale.data.writing.sources.image_folder import image_folder
from maskmatch_scale.data.writing.sources.options import Options
from tests.conftest import TINY_SEGFORMER, draw_shapes


def photos(folder: Path) -> None:
    """`photos/images`, `photos/masks` for most of them, with three classes; and `tiny`, a SegFormer's configuration."""
    _write(folder, "photos", 12, 8, lambda label: label)
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps({"model_type": "segformer"} | TINY_SEGFORMER))


def shards(folder: Path) -> None:
    """`data/photos`, of `photos`."""
    (folder / "names.txt").write_text("ground\ncrack\nplant\n")
    source = image_folder(folder / "photos", Options(classes=str(folder / "names.txt"), dev="2", val="2"))
    write_shards(source, folder / "data" / "photos", workers=1, progress=False)


def recipe(folder: Path) -> None:
    """`configs/mine.yaml`, of `data/photos` and `tiny`."""
    (folder / "configs").mkdir()
    content = {
        "data": {"root": "data/photos", "crop_px": 64, "workers": 0},
        "model": {"backbone": "transformers/tiny"},
        "engine": {"library": "accelerate", "zero_stage": 0, "micro_batch": 2},
        "run": {"dir": "runs/mine", "steps": 1},
    }
    (folder / "configs" / "mine.yaml").write_text(json.dumps(content))


def binary(folder: Path) -> None:
    """`scans`, with masks of 0 and 255."""
    _write(folder, "scans", 8, 6, lambda label: np.where(label == 2, 255, 0).astype(np.uint8))


def soft(folder: Path) -> None:
    """`soft`, masks with soft edges."""
    (folder / "soft").mkdir()
    for number in range(2):
        Image.fromarray((draw_shapes(number)[1] == 1).astype(np.uint8) * 255).resize(
            (64, 48), Image.Resampling.BILINEAR
        ).save(folder / "soft" / f"{number}.png")


def scene(folder: Path) -> None:
    """`scenes` and `labels`: GeoTIFFs of 200 × 300 px, a part of which has no data; a second scene without labels."""
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    draw = np.random.default_rng(0)
    place = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_000_000, 0.5, 0.5), "driver": "GTiff"}
    size = {"width": 300, "height": 200, "dtype": "uint8"}
    for name in ("scenes", "labels"):
        (folder / name).mkdir()
    for name in ("a.tif", "b.tif"):
        pixels = draw.integers(1, 255, (3, 200, 300), dtype=np.uint8)
        pixels[:, :, 256:] = 0
        with rasterio.open(folder / "scenes" / name, "w", count=3, nodata=0, **size, **place) as file:
            file.write(pixels)
    with rasterio.open(folder / "labels" / "a.tif", "w", count=1, **size, **place) as file:
        file.write(draw.integers(0, 3, (1, 200, 300), dtype=np.uint8))


def _write(folder: Path, name: str, images: int, masks: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for part in ("images", "masks"):
        (folder / name / part).mkdir(parents=True)
    for number in range(images):
        image, label = draw_shapes(number)
        Image.fromarray(image).save(folder / name / "images" / f"{number:02d}.jpg")
        if number < masks:
            Image.fromarray(change(label)).save(folder / name / "masks" / f"{number:02d}.png")


PREPARED = {make.__name__: make for make in (photos, shards, recipe, binary, soft, scene)}
