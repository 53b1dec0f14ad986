"""What the loaders read: photo-like JPEGs, drawn from a seed, as a source of the package's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.images.encode import encode_image
from maskmatch_scale.data.writing import EncodedSample, StreamItems

_SCENES = 16


@dataclass(frozen=True)
class PhotoSource:
    """Unlabelled JPEGs of photo-like images: smooth shapes of several sizes and grain, each in its own colours."""

    count: int
    width: int
    height: int
    quality: int = 85
    name: str = "photos"
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    ignore_index: int = 255

    @property
    def settings(self) -> Mapping[str, object]:
        """The settings that decide the bytes."""
        return {"count": self.count, "width": self.width, "height": self.height, "quality": self.quality}

    @property
    def streams(self) -> Mapping[str, StreamItems]:
        """One stream without labels."""
        items = [(number, self.width, self.height, self.quality) for number in range(self.count)]
        return {"unlabelled": StreamItems(False, items)}

    @staticmethod
    def render(item: tuple[int, int, int, int]) -> EncodedSample:
        """A piece of one of a few scenes, brighter or darker, with grain of its own."""
        number, width, height, quality = item
        draw = np.random.default_rng(number)
        scene = _scene(int(draw.integers(_SCENES)), width, height)
        top, left = int(draw.integers(height // 2 + 1)), int(draw.integers(width // 2 + 1))
        image = scene[top : top + height, left : left + width, draw.permutation(3)] * draw.uniform(0.7, 1.2)
        image = image + draw.normal(0, 9, (height, width, 1)).astype(np.float32)
        jpeg = encode_image(Image.fromarray(image.clip(0, 255).astype(np.uint8)), "JPEG", quality=quality)
        return EncodedSample(f"photo-{number:06d}", jpeg, "jpg")


@lru_cache(maxsize=2 * _SCENES)
def _scene(number: int, width: int, height: int) -> NDArray[np.float32]:
    draw = np.random.default_rng(1000 + number)
    width, height = width + width // 2, height + height // 2
    scene = np.full((height, width, 3), 120, np.float32)
    for cells, contrast in ((4, 60), (12, 35), (40, 20), (160, 14)):
        coarse = draw.normal(0, contrast, (3, max(1, cells * height // width), cells)).astype(np.float32)
        planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in coarse]
        scene += np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return scene
