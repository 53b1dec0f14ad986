"""Which values of each band become 0 and 255, where the user does not say it: found in a sample of the images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.images.bands import Band
from maskmatch_scale.data.images.image import TWELVE_BITS
from maskmatch_scale.data.images.raster import Raster
from maskmatch_scale.data.writing.sources.band_options import AUTO, SKIPPED, parse_bands, parse_ranges
from maskmatch_scale.data.writing.sources.splits import sort_key
from maskmatch_scale.data.writing.sources.store_bands import BandRule, Planes, open_bands
from maskmatch_scale.errors import UserError

_SAMPLE = 64
"""Images that are looked at."""
_SIDE_PX = 512
"""Of a larger image so many rows and columns are looked at, evenly spread."""
_HUGE_PX = 1 << 25
"""Of an image of more pixels only some windows are read."""
_WINDOWS, _WINDOW_PX = 4, 128
"""How many of them along each side, and their side."""
_PERCENTILES = (0.5, 99.5)
_EIGHT_BITS = (0.0, 255.0)


@dataclass(frozen=True)
class FoundBands:
    """The bands of a data set.

    Attributes:
        rule: how its images are read.
        notes: what was found in its images, a line each.
    """

    rule: BandRule
    notes: tuple[str, ...]


@dataclass
class _Seen:
    """What was seen of the images of a sample.

    Attributes:
        values: of each band that is kept, of the pixels with data.
        kinds: types of values.
        images: how many were looked at.
        lacking: how many of them have pixels without data.
        share: the mean share of pixels without data, over all of them.
    """

    values: list[list[NDArray[np.int64]]]
    kinds: set[str] = field(default_factory=set)
    images: int = 0
    lacking: int = 0
    share: float = 0.0


def find_bands(names: str, ranges: str | None, root: Path, images: Iterable[str]) -> FoundBands:
    """The bands of a data set, as its user names them.

    Args:
        names: `--bands`.
        ranges: `--value-range`, None if it is not given.
        root: what paths are relative to.
        images: paths of all images.

    Raises:
        UserError: an option is not well formed, or a range is needed; says what the images hold.
        DataError: no image of the sample can be read.
    """
    all_names = parse_bands(names)
    kept = [name for name in all_names if name != SKIPPED]
    given = parse_ranges(ranges, kept)
    seen = _look(all_names, root, images)
    bands, eight_bits = [], set()
    wide = [name for name in kept if name not in given]
    if wide and seen.kinds != {"uint8"}:
        raise UserError(_what_is_needed(names, wide, kept, seen))
    for number, name in enumerate(kept):
        bounds = given.get(name, _EIGHT_BITS)
        if name not in given:
            eight_bits.add(name)
        bands.append(Band(name, *(bounds or _percentiles(np.concatenate(seen.values[number]), name))))
    rule = BandRule(all_names, tuple(bands), frozenset(eight_bits))
    return FoundBands(rule, tuple(_notes(rule, given, seen)))


def _look(names: Sequence[str], root: Path, images: Iterable[str]) -> _Seen:
    """Look at images that are drawn by their paths. Those that cannot be read are left out: writing names them."""
    numbers = [number for number, name in enumerate(names) if name != SKIPPED]
    seen = _Seen([[] for _ in numbers])
    first: BadSample | None = None
    for image in sorted(set(images), key=lambda path: sort_key(0, "bands", path))[:_SAMPLE]:
        path = root / image
        try:
            with open_bands(path, str(path), names) as opened:
                values, valid = _some_pixels(opened, numbers)
        except BadSample as error:
            first = first or error
            continue
        except OSError as error:
            first = first or BadSample("no_image", f"{path}: cannot be read ({error.strerror})")
            continue
        seen.images += 1
        seen.kinds.add(str(values.dtype))
        if valid is not None:
            seen.lacking += not valid.all()
            seen.share += 1 - float(valid.mean())
        for of_band, plane in zip(seen.values, values, strict=True):
            of_band.append((plane if valid is None else plane[valid]).ravel().astype(np.int64))
    if not seen.images:
        raise DataError(f"none of the images looked at can be read: {first}")
    seen.share /= seen.images
    return seen


def _some_pixels(opened: Raster | Planes, numbers: Sequence[int]) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Pixels of an image, evenly spread: (bands, h, w); and which have data, None: all."""
    height, width = opened.size_px
    if height * width <= _HUGE_PX:
        shape = (min(height, _SIDE_PX), min(width, _SIDE_PX))
        return opened.read(numbers, shape), opened.valid(numbers, shape)
    rows, columns = (
        [slice(at, min(at + _WINDOW_PX, side)) for at in range(side // (2 * _WINDOWS), side, side // _WINDOWS)]
        for side in (height, width)
    )
    windows = [(down, across) for down in rows for across in columns]
    values = [opened.read(numbers, window=window).reshape(len(numbers), 1, -1) for window in windows]
    valid = [opened.valid(numbers, window=window) for window in windows]
    known = [part.reshape(1, -1) for part in valid if part is not None]
    return np.concatenate(values, axis=2), np.concatenate(known, axis=1) if known else None


def _percentiles(values: NDArray[np.int64], name: str) -> tuple[float, float]:
    if not len(values):
        raise UserError(f"--value-range {AUTO}: no pixel of band {name!r} has data; write {name}=LOW:HIGH")
    low, high = np.percentile(values, _PERCENTILES).tolist()
    low, high = float(floor(low)), float(ceil(high))
    if low == high:
        raise UserError(f"--value-range {AUTO}: band {name!r} has the value {low:g} alone; write {name}=LOW:HIGH")
    return low, high


def _extremes(values: Sequence[NDArray[np.int64]]) -> tuple[int, int] | None:
    found = [(int(of_image.min()), int(of_image.max())) for of_image in values if len(of_image)]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


def _what_is_needed(names: str, wide: Sequence[str], kept: Sequence[str], seen: _Seen) -> str:
    found = {name: _extremes(values) for name, values in zip(kept, seen.values, strict=True) if name in wide}
    parts = [f"{name} {ends[0]} to {ends[1]}" if ends else f"{name} no data" for name, ends in found.items()]
    known = [ends for ends in found.values() if ends is not None]
    all_12_bits = bool(known) and all(low >= 0 and 255 < high < TWELVE_BITS for low, high in known)
    hint = "12-bit data? --value-range 0:4095" if all_12_bits else "--value-range LOW:HIGH or NAME=LOW:HIGH,…"
    return (
        f"--bands {names}: these images have 16 bits; which values become 0 and 255? In {_counted(seen.images)} looked "
        f"at: {', '.join(parts)}. {hint}, or --value-range {AUTO}: percentiles {_PERCENTILES[0]} and {_PERCENTILES[1]}"
    )


def _notes(rule: BandRule, given: dict[str, tuple[float, float] | None], seen: _Seen) -> Iterable[str]:
    found = [f"{band.name} {band.low:g}:{band.high:g}" for band in rule.bands if given.get(band.name, 0) is None]
    if found:
        which = f"percentiles {_PERCENTILES[0]} and {_PERCENTILES[1]} of {_counted(seen.images)}"
        yield f"--value-range {AUTO}: {', '.join(found)} ({which})"
    if seen.lacking:
        yield (
            f"{seen.lacking} of {_counted(seen.images)} looked at have pixels without data, {seen.share:.1%} of all "
            "pixels: they are stored as the low end of each range, and ignored in label maps"
        )


def _counted(images: int) -> str:
    return f"{images} image{'s' * (images != 1)}"
