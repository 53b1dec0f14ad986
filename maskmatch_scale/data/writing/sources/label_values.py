"""What 255 means in label maps of which nobody has said it: a class of a binary mask, or ignored pixels.

Masks of one kind of object are often images with the values 0 and 255, while 255 is by convention the value of ignored
pixels. No single map tells the two apart: one of a data set with ignored pixels may show no object. So the whole set is
looked at, in an order that only the paths decide, until the answer is known.

Decision: docs/decisions/0081-binary-masks-are-recognised-by-the-whole-set.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.images.label import decode_raw_values
from maskmatch_scale.data.images.opening import start_of
from maskmatch_scale.data.images.tiff import is_tiff
from maskmatch_scale.data.images.tiff_labels import open_tiff_values
from maskmatch_scale.data.pool import in_threads, usable_cores
from maskmatch_scale.data.writing.sources.classes import IGNORE
from maskmatch_scale.data.writing.sources.splits import sort_key

LOOKED_AT = 1000
"""Label maps with 255, or without values, after which those of the others are taken to be the same."""

_SHOWN = 5
"""Values that a message shows, besides the last."""
_ROWS = 512
"""Of a huge label map that are read together."""
_AT_ONCE = 8
"""Label maps that are read a thread before the next ones are."""


def binary_values(
    root: Path, labels: Sequence[str], classes: Sequence[str], *, unknown_as_ignore: bool
) -> Mapping[int, int] | None:
    """Class values by label value, if label maps are binary masks of 0 and 255.

    Args:
        root: what paths are relative to.
        labels: paths of all label maps. Their order makes no difference.
        classes: names.
        unknown_as_ignore: whether values that are no class are ignored. Otherwise the writer refuses their label maps.

    Returns:
        ``{0: 0, 255: 1}``; None: values are class values, and 255 is ignored.

    Raises:
        DataError: 255 occurs, and nothing tells whether it is a class; it names a file and shows an id map.
    """
    pure: _Found | None = None  # the first with nothing but 0 and 255, or 255 alone
    mixed: _Found | None = None  # the first with 255 and values that are no class
    has_zero, seen = False, 0
    for found in _values(root, sorted(set(labels), key=lambda path: sort_key(0, "label values", path))):
        values = found.values
        others = [value for value in values if len(classes) <= value != IGNORE]
        has_class = any(0 < value < len(classes) for value in values)
        if has_class and not others:
            return None
        has_zero |= 0 in values
        seen += IGNORE in values or not values
        if IGNORE in values:
            if not others:
                pure = pure or found
            elif not has_class:
                mixed = mixed or found
            elif unknown_as_ignore:
                raise DataError(_question(root, found, classes))
        if seen == LOOKED_AT:  # the writer refuses values that others turn out to have
            break
    if pure is not None and has_zero and len(classes) == 2:
        return {0: 0, IGNORE: 1}
    if doubtful := pure or mixed:
        raise DataError(_question(root, doubtful, classes))
    return None


class _Found(NamedTuple):
    """The values of a label map."""

    path: str
    values: list[int]
    """Ascending."""


def _values(root: Path, paths: Sequence[str]) -> Iterator[_Found]:
    """The values of each label map, in this order; none of those that cannot be read or have colours.

    The first is read alone: in most data sets no other has to be.
    """

    def look(path: str) -> _Found:
        try:
            pixels = decode_raw_values((root / path).read_bytes(), path)
        except OSError:  # the writer will say so
            return _Found(path, [])
        except BadSample:  # likewise, if it is not only too large to be read whole
            return _Found(path, _values_of_tiff(root / path))
        return _Found(path, [] if pixels.ndim == 3 else np.unique(pixels).tolist())

    threads = usable_cores()
    starts = [0, *range(1, len(paths), _AT_ONCE * threads), len(paths)]
    for start, end in itertools.pairwise(starts):
        yield from in_threads(look, paths[start:end], threads, at_once=1)


def _values_of_tiff(path: Path) -> list[int]:
    """The values of a TIFF, ascending, read in parts; none if it cannot be read so, or has colours."""
    found: set[int] = set()
    if not is_tiff(start_of(path)) or not find_spec("rasterio"):
        return []
    try:
        with open_tiff_values(path, str(path)) as tiff:
            if tiff is None:
                return []
            height, width = tiff.size_px
            for top in range(0, height, _ROWS):
                pixels = tiff.read(slice(top, min(top + _ROWS, height)), slice(0, width))
                if pixels.ndim == 3:
                    return []
                found |= set(np.flatnonzero(np.bincount(pixels.ravel())).tolist())
    except BadSample:
        return []
    return sorted(found)


def _question(root: Path, found: _Found, classes: Sequence[str]) -> str:
    """What has to be said of the values of a label map, and how."""
    values = found.values
    held = ", ".join(map(str, values[: min(_SHOWN, len(values) - 1)])) or "nothing but"
    held += f"{' …' if len(values) > _SHOWN + 1 else ''}{' and' if len(values) > 1 else ''} {values[-1]}"
    named = "one class is" if len(classes) == 1 else f"{len(classes)} classes are"
    other = next((value for value in values if len(classes) <= value != IGNORE), None)
    lines = [f"`0: {classes[0]}`", *([f"`{other}: ignore`"] if other is not None else [])]
    lines.append(f"`{IGNORE}: {classes[-1] if len(classes) > 1 else 'ignore'}`")
    return (
        f"{root / found.path}: holds {held}, and {named} named: nothing says whether {IGNORE} is a class or ignored; "
        f"say it by --id-map FILE, a line for each value, such as {', '.join(lines)}"
    )
