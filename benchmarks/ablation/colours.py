r"""Writes the shards of the null case: images in which the colour of a pixel says its class.

    python -m benchmarks.ablation.colours SHARDS
    python -m benchmarks.ablation --task colours --data SHARDS --arms supervised fixmatch maskmatch --steps 450 \
        --work FOLDER --out FILE.json

Two labelled images show all that there is to know, so unlabelled images and masks have nothing to add. An ablation that
finds a gain here measures something else than it says.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import say
from maskmatch_scale.data.writing import EncodedSample, StreamItems, write_shards

SIDE_PX = 192
REGIONS = 24
"""Of an image: the pixels nearest to each of so many points."""
NOISE = 12.0
"""Standard deviation of each pixel's and channel's normal noise; colours of two classes are at least 120 apart."""
COLOURS = {"grey": (128, 128, 128), "red": (208, 64, 64), "green": (64, 208, 64), "blue": (64, 64, 208)}
COUNTS = {"labelled": 16, "unlabelled": 96, "dev": 8, "val": 16}
"""Images by stream."""


def draw(seed: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image (SIDE_PX, SIDE_PX, 3) and its class values (SIDE_PX, SIDE_PX)."""
    random = np.random.default_rng(seed)
    points = random.uniform(0, SIDE_PX, (REGIONS, 2))
    classes = random.integers(0, len(COLOURS), REGIONS).astype(np.uint8)
    at = np.indices((SIDE_PX, SIDE_PX)).transpose(1, 2, 0)[:, :, None]
    label = classes[((at - points) ** 2).sum(-1).argmin(-1)]
    image = np.array(list(COLOURS.values()))[label] + random.normal(0, NOISE, (SIDE_PX, SIDE_PX, 3))
    return image.round().clip(0, 255).astype(np.uint8), label


@dataclass(frozen=True)
class ColoursSource:
    """A :class:`maskmatch_scale.data.writing.DataSource`."""

    name: str = "colours"
    classes: tuple[str, ...] = tuple(COLOURS)
    palette: tuple[tuple[int, int, int], ...] = tuple(COLOURS.values())
    ignore_index: int = 255

    @property
    def settings(self) -> Mapping[str, object]:
        """What the bytes depend on."""
        colours = {name: list(rgb) for name, rgb in COLOURS.items()}
        return {"side_px": SIDE_PX, "regions": REGIONS, "noise": NOISE, "colours": colours, "counts": COUNTS}

    @property
    def streams(self) -> Mapping[str, StreamItems]:
        """Streams by name; an item is the numbers of its stream and of its image."""
        return {
            name: StreamItems(name != "unlabelled", [(stream, number) for number in range(count)])
            for stream, (name, count) in enumerate(COUNTS.items())
        }

    @staticmethod
    def render(item: tuple[int, int]) -> EncodedSample:
        """The sample of an item."""
        stream, number = item
        image, label = draw(item)
        name = list(COUNTS)[stream]
        return EncodedSample(
            f"{name}-{number:04d}", _encoded(image, "WEBP"), "webp", None if name == "unlabelled" else _encoded(label)
        )


def _encoded(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the shards; 0, or 2 for a folder that cannot be used."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ablation.colours",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="SHARDS", help="shard folder to write")
    options = parser.parse_args(arguments)
    try:
        write_shards(ColoursSource(), options.out, workers=1)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
