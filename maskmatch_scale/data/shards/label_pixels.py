"""How many pixels of each class the label maps of a stream have, and what is wrong with such numbers.

A class that never occurs cannot be learned, and its IoU cannot be measured. Mostly ignored label maps are often masks
whose values mean something else. Both are seldom intended, and nothing else shows them: a loss over what is left falls
as it should.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.images.label import decode_values
from maskmatch_scale.data.shards.index import ShardIndex

MOST_IGNORED = 0.5
"""Share of ignored pixels from which on a stream is warned of."""

_NAMED = 5
"""Classes that a warning names; of more it says how many."""


def count_pixels(values: NDArray[np.uint8], classes: int, ignore_index: int) -> NDArray[np.int64]:
    """Pixels of each class in a label map.

    Args:
        values: uint8 (H, W), class values and ``ignore_index``.
        classes: number of classes.
        ignore_index: value of ignored pixels.

    Returns:
        int64 (classes + 1,); last those that are ignored.
    """
    counts = np.bincount(values.ravel(), minlength=256)
    return np.append(counts[:classes], counts[ignore_index]).astype(np.int64)


def pixels_of(data: bytes, name: str, classes: int, ignore_index: int) -> tuple[int, ...]:
    """Pixels of each class in an encoded label map, and last those that are ignored: classes + 1 numbers.

    Args:
        data: a PNG, as in a shard.
        name: names it in messages.
        classes: number of classes.
        ignore_index: value of ignored pixels.

    Raises:
        BadSample: it is no label map, or has a value that is neither a class nor ignored.
    """
    values = decode_values(data, name, num_classes=classes, ignore_index=ignore_index)
    return tuple(count_pixels(values, classes, ignore_index).tolist())


def sum_of(counts: Iterable[Sequence[int] | None]) -> tuple[int, ...] | None:
    """The sum of such numbers, place by place; None if one of them is not known, or there are none."""
    each = list(counts)
    known = [numbers for numbers in each if numbers is not None]
    return tuple(map(sum, zip(*known, strict=True))) if known and len(known) == len(each) else None


def pixel_warnings(where: str, pixels: Sequence[int], classes: Sequence[str], *, ignored: bool = True) -> list[str]:
    """What should not be so without the user's knowledge: a line for each.

    Args:
        where: what has these pixels, to begin a line with.
        pixels: of each class, and last those that are ignored.
        classes: names.
        ignored: whether to warn of ignored pixels.
    """
    lines = []
    if absent := [name for name, count in zip(classes, pixels, strict=False) if not count]:
        lines.append(f"{where}: no pixel of {named(absent)}")
    total = sum(pixels)
    if ignored and total and pixels[-1] > MOST_IGNORED * total:
        lines.append(f"{where}: {pixels[-1] / total:.1%} of the pixels are ignored")
    return lines


def index_warnings(index: ShardIndex) -> list[str]:
    """Such lines for each labelled stream of an index that says its pixels."""
    return [
        line
        for name, pixels in known_pixels(index).items()
        for line in pixel_warnings(f"stream {name!r}", pixels, index.classes)
    ]


def ignored_notes(index: ShardIndex) -> list[str]:
    """How many pixels are ignored, a line for each labelled stream that has some and is not warned of them."""
    return [
        f"stream {name!r}: {100 * pixels[-1] / sum(pixels):.2g}% of the pixels are ignored"
        for name, pixels in known_pixels(index).items()
        if 0 < pixels[-1] <= MOST_IGNORED * sum(pixels)
    ]


def known_pixels(index: ShardIndex) -> Mapping[str, tuple[int, ...]]:
    """Pixels of each class and ignored ones, by stream, of those labelled streams of which the index says them."""
    return {
        name: stream.class_pixels
        for name, stream in index.streams.items()
        if stream.class_pixels is not None and len(stream.class_pixels) == len(index.classes) + 1
    }


def named(classes: Sequence[str]) -> str:
    """Some classes in a sentence: all if they are few, otherwise the first ones and how many more there are."""
    names = ", ".join(repr(name) for name in classes[:_NAMED])
    more = len(classes) - _NAMED
    return f"class{'es' if len(classes) > 1 else ''} {names}" + (f" and {more} more" if more > 0 else "")
