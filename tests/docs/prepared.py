"""The data that pages of the documentation speak of, small: `<!-- page test: prepare NAME -->`."""

from __future__ import annotations

import json
import shutil
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
from tests.data.banded import NAMES, measured, write_geotiffs
from tests.docs.layouts import LAYOUTS

_COUNTS = {"labelled": 4, "unlabelled": 8, "dev": 2, "val": 2}


def photos(folder: Path) -> None:
    """`photos/images`, `photos/masks` for most of them, with three classes; and `tiny`, a SegFormer's configuration."""
    _write(folder, "photos", 12, 8, lambda label: label)
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps({"model_type": "segformer"} | TINY_SEGFORMER))


def grown_photos(folder: Path) -> None:
    """Three more in `photos`, two of them with label maps."""
    _write(folder, "photos", 3, 2, lambda label: label, first=20)


def more_photos(folder: Path) -> None:
    """`more/images` and `more/masks`, other photos."""
    _write(folder, "more", 4, 3, lambda label: label, first=40)


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


def street(folder: Path) -> None:
    """`street`: instances and panoptic segments of COCO's layout, of cars and trees; one image has no annotation."""
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "tree"}, {"id": 5, "name": "sign"}]
    (folder / "street" / "annotations" / "panoptic_val2017").mkdir(parents=True)
    (folder / "street" / "val2017").mkdir()
    images, instances, panoptic = [], [], []
    for number in range(8):
        image, label = draw_shapes(number)
        height, width = label.shape
        Image.fromarray(image).save(folder / "street" / "val2017" / f"{number}.jpg")
        ids = np.zeros((height, width, 3), np.uint8)
        ids[..., 0] = np.where(label == 255, 0, label)
        Image.fromarray(ids).save(folder / "street" / "annotations" / "panoptic_val2017" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
        found = [value for value in (1, 2) if (label == value).any()]
        segments = [{"id": value, "category_id": value, "iscrowd": 0} for value in found]
        panoptic.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
        for value in found if number else ():
            pixels = (label == value).T.ravel()
            edges = [0, *(np.flatnonzero(np.diff(pixels)) + 1).tolist(), pixels.size]
            counts = [0] * bool(pixels[0]) + np.diff(edges).tolist()
            shape = {"size": [height, width], "counts": counts}
            row = {"id": len(instances), "image_id": number, "category_id": value, "segmentation": shape}
            instances.append(row | {"iscrowd": 0, "bbox": [0, 0, width, height]})
    for kind, rows in (("instances", instances), ("panoptic", panoptic)):
        content = {"images": images, "categories": categories, "annotations": rows}
        (folder / "street" / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(content))


def outlined(folder: Path) -> None:
    """`outlined`: images with labelme's JSONs, of discs and boxes."""
    (folder / "outlined").mkdir()
    for number in range(6):
        image, label = draw_shapes(number)
        Image.fromarray(image).save(folder / "outlined" / f"{number}.jpg")
        shapes = []
        for value, name in ((1, "box"), (2, "disc")):
            y, x = np.nonzero(label == value)
            if len(y):
                points = [[int(x.min()), int(y.min())], [int(x.max()) + 1, int(y.max()) + 1]]
                shapes.append({"label": name, "points": points, "shape_type": "rectangle"})
        size = {"imageHeight": label.shape[0], "imageWidth": label.shape[1]}
        (folder / "outlined" / f"{number}.json").write_text(json.dumps({"shapes": shapes, **size}))


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


def bands(folder: Path) -> None:
    """`fields/images` and `fields/labels`, GeoTIFFs: ten of five bands of 16 bits, eight with label maps; `names.txt`;
    and `tiny`, a SegFormer's configuration.
    """
    import rasterio

    write_geotiffs(folder / "fields", 10, 8)
    for path in sorted((folder / "fields" / "labels").glob("*.png")):
        with (
            Image.open(path) as image,
            rasterio.open(folder / "fields" / "images" / path.with_suffix(".tif").name) as of,
        ):
            profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "crs": of.crs, "transform": of.transform}
            size = {"width": of.width, "height": of.height}
            with rasterio.open(path.with_suffix(".tif"), "w", **profile, **size) as file:
                file.write(np.asarray(image), 1)
        path.unlink()
    shutil.copy(folder / "fields" / "names.txt", folder / "names.txt")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps({"model_type": "segformer"} | TINY_SEGFORMER))


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


def fields_run(folder: Path) -> None:
    """`runs/fields`, of shards of five bands, and GeoTIFFs to predict: `scenes/five.tif`, and `scenes/six.tif`."""
    import rasterio

    write_geotiffs(folder / "fields", 8, 6)
    names = str(folder / "fields" / "names.txt")
    options = Options(classes=names, dev="2", bands=",".join(NAMES), value_range="0:4000")
    write_shards(image_folder(folder / "fields", options), folder / "data" / "fields", workers=1, progress=False)
    data, run = {"root": str(folder / "data" / "fields")}, {"dir": str(folder / "runs" / "fields"), "steps": 1}
    train(_mine(folder, data=data, run=run))
    (folder / "scenes").mkdir()
    bands = measured(9)[0]
    for name, pixels in (("five", bands), ("six", np.concatenate([bands, bands[:1]]))):
        count, height, width = pixels.shape
        size = {"count": count, "height": height, "width": width, "dtype": "uint16"}
        with rasterio.open(folder / "scenes" / f"{name}.tif", "w", driver="GTiff", **size) as file:
            file.write(pixels)


def _mine(folder: Path, **sections: Mapping[str, Any]) -> Recipe:
    engine = {"library": "accelerate", "zero_stage": 0, "micro_batch": 2, "threads": 1}
    run = {"dir": str(folder / "runs" / "mine"), "steps": 1}
    return recipe_maker(folder / "data" / "mine", folder)(**({"engine": engine, "run": run} | sections))


def _write(
    folder: Path, name: str, images: int, masks: int, change: Callable[[np.ndarray], np.ndarray], first: int = 0
) -> None:
    for part in ("images", "masks"):
        (folder / name / part).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + images):
        image, label = draw_shapes(number)
        Image.fromarray(image).save(folder / name / "images" / f"{number:02d}.jpg")
        if number < first + masks:
            Image.fromarray(change(label)).save(folder / name / "masks" / f"{number:02d}.png")


PREPARED = {make.__name__: make for make in (
    photos, grown_photos, more_photos, shards, recipe, phone, binary, soft, scene, bands, mine, trained, exported, vit,
    downloaded, pictures, orthophoto, street, outlined, fields_run, *LAYOUTS,
)}  # fmt: skip
