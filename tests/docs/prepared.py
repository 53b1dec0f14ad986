"""The data that pages of the documentation speak of, small: `<!-- page test: prepare NAME -->`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from maskmatch_scale.data.writing import write_shards
from maskmatch_scale.data.writing.sources.image_folder import image_folder
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.export.write import export_run
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.train import train
from tests.conftest import TINY_SEGFORMER, ShapesSource, draw_shapes, recipe_maker

_COUNTS = {"labelled": 4, "unlabelled": 8, "dev": 2, "val": 2}


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


def phone(folder: Path) -> None:
    """`phone/images`, one of which is stored turned, `phone/masks`, drawn upright, and `names.txt`."""
    _write(folder, "phone", 4, 4, lambda label: label)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = folder / "phone" / "images" / "00.jpg"
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    (folder / "names.txt").write_text("ground\ncrack\nplant\n")


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
    import rasterio
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


def mine(folder: Path) -> None:
    """`data/mine`, three classes; `configs/mine.yaml` of it and a tiny SegFormer, for a run `runs/mine`."""
    write_shards(ShapesSource(_COUNTS), folder / "data" / "mine", workers=1, progress=False)
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "mine.yaml").write_text(_mine(folder).to_yaml())


def trained(folder: Path) -> None:
    """What `mine` makes, and the run."""
    mine(folder)
    train(_mine(folder))


def exported(folder: Path) -> None:
    """`exports/mine`, of `trained`."""
    export_run(folder / "runs" / "mine", folder / "exports" / "mine")


def vit(folder: Path) -> None:
    """`recipe.yaml` of `data/mine` and a tiny ViT, for a run `runs/vit`."""
    mine(folder)
    recipe = _mine(folder, model={"backbone": "timm/test_vit2"}, run={"dir": "runs/vit", "steps": 3, "log_every": 1})
    (folder / "recipe.yaml").write_text(recipe.to_yaml())


def downloaded(folder: Path) -> None:
    """`weights/segformer-b2-ade`, a tiny SegFormer of transformers with 150 classes; `tiny`, its configuration."""
    model = SegformerForSemanticSegmentation(SegformerConfig(**TINY_SEGFORMER, num_labels=150))
    model.save_pretrained(folder / "weights" / "segformer-b2-ade")
    model.config.save_pretrained(folder / "tiny")


def pictures(folder: Path) -> None:
    """To predict: `photos`, `scans`, a list, single files."""
    files = ("photos/1.jpg", "photos/more/2.jpg", "scans/new/3.png", "a.jpg", "photo.jpg", "x.jpg")
    for number, name in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_shapes(number)[0]).save(folder / name)
    (folder / "list.txt").write_text("# a list\nphotos/1.jpg\n")


def orthophoto(folder: Path) -> None:
    """`ortho.tif`, 96 × 128 px with a georeference."""
    import rasterio
    from rasterio.transform import from_origin

    place = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_000_000, 0.5, 0.5), "driver": "GTiff"}
    with rasterio.open(folder / "ortho.tif", "w", count=3, width=128, height=96, dtype="uint8", **place) as file:
        file.write(np.moveaxis(draw_shapes(9)[0], 2, 0))


def _mine(folder: Path, **sections: Mapping[str, Any]) -> Recipe:
    engine = {"library": "accelerate", "zero_stage": 0, "micro_batch": 2, "threads": 1}
    run = {"dir": str(folder / "runs" / "mine"), "steps": 1}
    return recipe_maker(folder / "data" / "mine", folder)(**({"engine": engine, "run": run} | sections))


def _write(folder: Path, name: str, images: int, masks: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for part in ("images", "masks"):
        (folder / name / part).mkdir(parents=True)
    for number in range(images):
        image, label = draw_shapes(number)
        Image.fromarray(image).save(folder / name / "images" / f"{number:02d}.jpg")
        if number < masks:
            Image.fromarray(change(label)).save(folder / name / "masks" / f"{number:02d}.png")


PREPARED = {make.__name__: make for make in (
    photos, shards, recipe, phone, binary, soft, scene, mine, trained, exported, vit, downloaded, pictures, orthophoto,
)}  # fmt: skip
