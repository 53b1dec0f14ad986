"""What `--bands` and `--value-range` say: names of bands, and ranges of values by name."""

from __future__ import annotations

from collections.abc import Sequence

from maskmatch_scale.data.images.bands import Band
from maskmatch_scale.errors import UserError

SKIPPED = "-"
"""In `--bands`: a band that is not stored."""
AUTO = "auto"
"""In `--value-range`: the range is found in the images."""

Range = tuple[float, float]
"""The values that become 0 and 255."""


def parse_bands(text: str) -> tuple[str, ...]:
    """The names of all bands of the images, in their order.

    Args:
        text: `red,green,blue,-,nir`.

    Raises:
        UserError: a name is empty, has a character that `--value-range` cuts at, or stands twice; or all are skipped.
    """
    names = tuple(name.strip() for name in text.split(","))
    kept = [name for name in names if name != SKIPPED]
    if not all(names) or any(set("=:") & set(name) for name in names):
        raise UserError(f"--bands {text}: a name a band, such as red,green,blue,nir ({SKIPPED} leaves a band out)")
    if not kept:
        raise UserError(f"--bands {text}: no band is left")
    if len(set(kept)) < len(kept):
        twice = next(name for name in kept if kept.count(name) > 1)
        raise UserError(f"--bands {text}: two bands are called {twice!r}")
    return names


def parse_ranges(text: str | None, names: Sequence[str]) -> dict[str, Range | None]:
    """The range of each band for which the user gave one; None: it is to be found in the images.

    Args:
        text: `LOW:HIGH` or `auto` for all bands, `NAME=LOW:HIGH` or `NAME=auto` for one; several with commas between.
        names: of the bands.

    Raises:
        UserError: it is none of these, or names no band.
    """
    found: dict[str, Range | None] = {}
    for_all: dict[str, Range | None] = {}
    for part in (text or "").split(",") if text is not None else ():
        name, equals, bounds = part.strip().rpartition("=")
        if equals and name not in names:
            raise UserError(f"--value-range {part}: there is no band {name!r}, but {', '.join(names)}")
        given = None if bounds == AUTO else _bounds(bounds, part)
        into = {name: given} if equals else dict.fromkeys(names, given)
        (found if equals else for_all).update(into)
    return for_all | found


def given_bands(names: str, ranges: str | None) -> tuple[Band, ...]:
    """Bands of shards that exist already. Their images are not looked at, so every band needs a range.

    Raises:
        UserError: names or ranges are not well formed, a band is left out, or one has no range.
    """
    named = parse_bands(names)
    if SKIPPED in named:
        raise UserError(f"--bands {names}: the pages of shards are all named; choose some with data.channels")
    known = parse_ranges(ranges, named)
    bands = []
    for name in named:
        bounds = known.get(name)
        if bounds is None:
            raise UserError(
                f"--bands {names}: --value-range LOW:HIGH must say which values of {name!r} become 0 and 255"
            )
        bands.append(Band(name, *bounds))
    return tuple(bands)


def _bounds(text: str, part: str) -> Range:
    low, colon, high = text.partition(":")
    try:
        bounds = (float(low), float(high))
        if not colon:
            raise ValueError
        Band("any", *bounds)
    except ValueError:
        raise UserError(
            f"--value-range {part}: write LOW:HIGH, the values that become 0 and 255 (0:4095), NAME=LOW:HIGH for one "
            f"band, or {AUTO}"
        ) from None
    return bounds
