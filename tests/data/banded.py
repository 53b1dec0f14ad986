"""GeoTIFFs of five bands of 16 bits, with label maps: a data set of remote sensing, small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import draw_shapes

NAMES = ("red", "green", "blue", "nir", "swir")
SPECTRA = np.array([[600, 3000, 500], [800, 900, 700], [500, 700, 900], [3500, 1800, 200], [2000, 2500, 100]])
"""By band and class: what is measured, before noise."""


def measured(number: int) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Bands uint16 (5, 96, 128) and label map (96, 128) of an image."""
    label = draw_shapes(number)[1]
    noise = np.random.default_rng(number).normal(scale=60, size=(5, *label.shape))
    return (SPECTRA[:, label % 3] + noise).clip(1, 65535).astype(np.uint16), label


def write_geotiffs(root: Path, count: int, labelled: int) -> None:
    """`root/images/NN.tif`, `root/labels/NN.png` for the first ones, and `root/names.txt`.

    Every other image is planar. In every fourth the upper left 10 × 20 px have no data (the value 0).
    """
    import rasterio
    from rasterio.transform import from_origin

    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    (root / "names.txt").write_text("ground\nroof\nwater\n")
    size = {"width": 128, "height": 96, "count": 5, "dtype": "uint16"}
    place = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_000_000, 10, 10)}
    for number in range(count):
        bands, label = measured(number)
        lacking = number % 4 == 0
        if lacking:
            bands[:, :10, :20] = 0
        how = {"interleave": "band" if number % 2 else "pixel", "compress": "deflate"} | (
            {"nodata": 0} if lacking else {}
        )
        with rasterio.open(root / "images" / f"{number:02d}.tif", "w", driver="GTiff", **size, **place, **how) as file:
            file.write(bands)
        if number < labelled:
            Image.fromarray(label).save(root / "labels" / f"{number:02d}.png")
