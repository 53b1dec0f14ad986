"""The regions of a map of classes: COCO's run lengths, one mask a class; GeoJSON, one polygon a connected region."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.extras import needs
from maskmatch_scale.predict.rows import NO_DATA


def need_coco() -> Any:
    """The module pycocotools.mask.

    Raises:
        UserError: it is not installed.
    """
    return needs("pycocotools", "pycocotools.mask", "coco", "--polygons coco")


def need_geojson() -> Any:
    """The module rasterio.features.

    Raises:
        UserError: it is not installed.
    """
    return needs("rasterio", "rasterio.features", "geo", "--polygons geojson")


def coco_annotations(classes: NDArray[np.uint8], name: str, names: tuple[str, ...]) -> str:
    """A data set of COCO's format with one image, and an annotation for each class that occurs in it.

    Args:
        classes: (H, W).
        name: of the image.
        names: of the classes; the id of a category is the class's number, from 0 on.
    """
    mask = need_coco()
    height, width = classes.shape
    annotations: list[dict[str, Any]] = []
    for number in np.flatnonzero(np.bincount(classes.ravel(), minlength=256)).tolist():
        if number == NO_DATA:
            continue
        # Column by column, as run lengths are counted.
        found = mask.encode(np.asfortranarray(classes == number).view(np.uint8))
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": 1,
                "category_id": number,
                "segmentation": {"size": [height, width], "counts": found["counts"].decode("ascii")},
                "area": int(mask.area(found)),
                "bbox": mask.toBbox(found).tolist(),
                "iscrowd": 1,
            }
        )
    content = {
        "images": [{"id": 1, "file_name": name, "height": height, "width": width}],
        "categories": [{"id": number, "name": text} for number, text in enumerate(names)],
        "annotations": annotations,
    }
    return json.dumps(content, ensure_ascii=False)


def geojson_features(
    classes: NDArray[np.uint8], names: tuple[str, ...], georeference: dict[str, Any] | None, path: Path
) -> None:
    """Write polygons, one feature for each connected region (4 neighbours a pixel).

    Coordinates are those of the image's CRS, which is named in the member `crs` that GDAL and QGIS read, or pixels from
    the upper left corner, y downwards, if it has none.

    Args:
        classes: (H, W).
        names: of the classes.
        georeference: of :class:`maskmatch_scale.data.images.tiff.TiffImage`; None: the image has none.
        path: file to write.
    """
    features = need_geojson()
    where = georeference or {}
    options = {"transform": where["transform"]} if "transform" in where else {}
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", ')
        code = where["crs"].to_authority() if where.get("crs") and options else None
        if code is not None:
            urn = f"urn:ogc:def:crs:{code[0]}::{code[1]}"
            file.write(f'"crs": {json.dumps({"type": "name", "properties": {"name": urn}})}, ')
        file.write('"features": [')
        between = "\n"
        for geometry, value in features.shapes(classes, mask=classes != NO_DATA, connectivity=4, **options):
            number = int(value)
            text = names[number] if number < len(names) else f"unnamed {number}"
            feature = {"type": "Feature", "properties": {"value": number, "class": text}, "geometry": geometry}
            file.write(between + json.dumps(feature, ensure_ascii=False))
            between = ",\n"
        file.write("\n]}\n")
