"""Ageing: from a clean drawing to what a flatbed scan of an old print looks like.

Only the geometry touches the label, and it does so before pixels exist: the points of the oversampled raster are moved,
and image and label are both made from the moved points. Everything after that changes the image alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]

MARGIN = 12
"""What :func:`bend` may reach outside the page, px, for pages of 512 px."""

_MAX_ROTATION = np.deg2rad(1.5)
_MAX_WARP = 2.5  # px


def bend(points: NDArray[np.uint8], size: int, margin: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Rotate a raster by up to 1.5° about its centre and warp it slowly by up to 2.5 px.

    Args:
        points: uint8 (s, s), classes of points; s = n · (size + 2 · margin).
        size: side of the page, px.
        margin: px drawn around the page.
        rng: the page's own generator.

    Returns:
        uint8 (n · size, n · size), each point the nearest one of the raster.
    """
    n = len(points) // (size + 2 * margin)
    angle = rng.uniform(-_MAX_ROTATION, _MAX_ROTATION)
    side = n * size
    centred = np.arange(side, dtype=np.float32) - (side - 1) / 2
    x, y = centred[None, :], centred[:, None]
    middle = (len(points) - 1) / 2
    # A few px over hundreds: made at page size and repeated for the points of a pixel, it is smooth enough.
    warp_x, warp_y = (np.kron(_smooth(rng, size, 4), np.ones((n, n), np.float32)) for _ in "xy")
    source_x = middle + np.cos(angle) * x - np.sin(angle) * y + n * _MAX_WARP * warp_x
    source_y = middle + np.sin(angle) * x + np.cos(angle) * y + n * _MAX_WARP * warp_y
    limit = len(points) - 1
    rows, columns = (np.clip(np.rint(c), 0, limit).astype(np.intp) for c in (source_y, source_x))
    bent: NDArray[np.uint8] = points[rows, columns]
    return bent


def age(ink: Floats, verso: Floats, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Print, soil, scan: a grey page from its ink.

    In order: ink that bled or wore off (a blur, cut at a level that varies over the page), specks, paper with its grain
    and a faint mirror image of the verso, uneven light, the scanner's blur and noise.

    Args:
        ink: float32 (H, W), 0–1, share of each pixel that is ink.
        verso: float32 (H, W), the same for the other side of the leaf, not yet mirrored.
        rng: the page's own generator.

    Returns:
        uint8 (H, W), 0 black.
    """
    size = len(ink)
    spread = _blur(ink, rng.uniform(0.45, 0.75))
    level = rng.uniform(0.30, 0.42) + 0.10 * _smooth(rng, size, 6) + 0.05 * _smooth(rng, size, 60)
    printed = 1 / (1 + np.exp(-(spread - level) / rng.uniform(0.07, 0.12)))
    printed = np.maximum(printed, _specks(rng, size, int(rng.integers(10, 60))))
    printed *= 1 - _specks(rng, size, int(rng.integers(10, 120)))

    paper_tone, ink_tone = rng.uniform(190, 245), rng.uniform(15, 75)
    grain = 1 + rng.uniform(0.004, 0.015) * _blur(_normal(rng, size), 0.8) + 0.02 * _smooth(rng, size, 10)
    through = rng.uniform(0, 0.13) * _blur(verso[:, ::-1], rng.uniform(1.0, 2.0))
    page = paper_tone * grain * (1 - through) * (1 - printed) + ink_tone * (1 + 0.15 * _smooth(rng, size, 40)) * printed

    light = 1 + rng.uniform(0.02, 0.10) * _smooth(rng, size, 2)
    scanned = _blur(page * light, rng.uniform(0.25, 0.6)) + rng.uniform(1, 5) * _normal(rng, size)
    return np.clip(np.rint(scanned), 0, 255).astype(np.uint8)


def _normal(rng: np.random.Generator, size: int) -> Floats:
    return rng.standard_normal((size, size), dtype=np.float32)


def _smooth(rng: np.random.Generator, size: int, cells: int) -> Floats:
    """A field that varies over a `cells`-th of the page: float32 (size, size) within −1 … 1."""
    coarse = rng.uniform(-1, 1, (cells + 2, cells + 2)).astype(np.float32)
    field: Floats = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    return np.clip(field, -1, 1)


def _blur(field: NDArray[np.floating], sigma: float) -> Floats:
    """Gaussian blur of (H, W), sigma in px, edges repeated."""
    radius = max(1, int(np.ceil(3 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    out = field.astype(np.float32)
    for axis in (0, 1):
        padded = np.pad(out, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        length = out.shape[axis]
        windows = (padded[s : s + length] if axis == 0 else padded[:, s : s + length] for s in range(len(kernel)))
        out = np.sum([weight * window for weight, window in zip(kernel, windows)], axis=0, dtype=np.float32)
    return out


def _specks(rng: np.random.Generator, size: int, count: int) -> Floats:
    """`count` soft dots of about a pixel: float32 (size, size) in 0–1."""
    dots = np.zeros((size, size), np.float32)
    rows, columns = rng.integers(0, size, (2, count))
    dots[rows, columns] = rng.uniform(1, 5, count)
    return np.minimum(_blur(dots, 0.6), 1)
