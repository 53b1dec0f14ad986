"""Bands of an image that is not plain RGB: their names, and which stored values become 0 to 255.

Shards keep the values as they were measured (8 or 16 bits). A decoder maps each band's own range, `low` to `high`,
linearly to 0 … 255 and clips what is outside, as `gdal_translate -scale` does. So batches are uint8 whatever was
measured, and another range or another choice of bands needs no new shards.

Decision: docs/decisions/0080-bands-are-stored-as-measured.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

RGB_NAMES = ("red", "green", "blue")
"""Names of the three channels of images without bands."""


@dataclass(frozen=True)
class Band:
    """One band.

    Attributes:
        name: of the band; unique in an index.
        low: stored value that becomes 0.
        high: stored value that becomes 255.
    """

    name: str
    low: float
    high: float

    def __post_init__(self) -> None:
        """Raise :class:`ValueError` for a band that no value could be read of."""
        if not self.name:
            raise ValueError("a band needs a name")
        if not (isfinite(self.low) and isfinite(self.high) and self.low < self.high):
            raise ValueError(f"band {self.name!r}: {self.low} to {self.high} is no range of values")


@dataclass(frozen=True)
class Channels:
    """What a decoder makes of a stored image with bands.

    Attributes:
        bands: by channel of the model.
        pages: number of the page of the stored image that holds each.
    """

    bands: tuple[Band, ...]
    pages: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the channels."""
        return tuple(band.name for band in self.bands)


def in_words(bands: Sequence[Band]) -> list[str]:
    """Names and ranges of values, for messages and files; those of plain images for none."""
    return [f"{band.name} ({band.low:g} to {band.high:g})" for band in bands] or list(RGB_NAMES)


def choose_channels(
    stored: Sequence[Band],
    names: Sequence[str] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Channels | None:
    """The channels of a model, of the bands that an index says its images have.

    Args:
        stored: bands of the index, by page; empty for plain images, which have the channels :data:`RGB_NAMES`.
        names: wanted bands in the order of the model's channels (`data.channels`); None: all that are stored.
        ranges: another range of values by name (`data.value_ranges`).

    Returns:
        None for plain RGB images, which need no choice.

    Raises:
        ValueError: a name that no band has, or a range that is none; names it and the bands that there are.
    """
    ranges = ranges or {}
    known = {band.name: page for page, band in enumerate(stored)} if stored else dict.fromkeys(RGB_NAMES, 0)
    wanted = tuple(known) if names is None else tuple(names)
    for key, given in (("data.channels", wanted), ("data.value_ranges", tuple(ranges))):
        for name in given:
            if name not in known:
                there = ", ".join(known)
                what = f"its bands are {there}" if stored else f"its images are plain ones, with {there}"
                raise ValueError(f"{key}: {name!r} is no band of the data; {what}")
    for name in wanted:
        if wanted.count(name) > 1:
            raise ValueError(f"data.channels: {name!r} is there twice")
    if not wanted:
        raise ValueError(f"data.channels: none is named; the bands are {', '.join(known)}, and null takes all")
    for name, (low, high) in ranges.items():
        if not (isfinite(low) and isfinite(high) and low < high):
            raise ValueError(f"data.value_ranges: {name}: [{low:g}, {high:g}] is no range; the lower end comes first")
    if not stored:
        if wanted != RGB_NAMES:
            raise ValueError(f"data.channels={list(wanted)}: plain images have the channels {list(RGB_NAMES)}")
        if ranges:
            raise ValueError("data.value_ranges: plain images have 8 bits a channel, and no range to choose")
        return None
    pages = tuple(known[name] for name in wanted)
    bands = (Band(name, *ranges.get(name, (stored[known[name]].low, stored[known[name]].high))) for name in wanted)
    return Channels(tuple(bands), pages)


def shown_channels(stored: Sequence[Band]) -> Channels | None:
    """The bands of an index that people are shown as red, green and blue, see :func:`shown_names`."""
    return choose_channels(stored, shown_names([band.name for band in stored]))


def shown_names(names: Sequence[str]) -> tuple[str, str, str]:
    """Which bands people are shown as red, green and blue: those of these names, or the first three, or one as grey."""
    if not names:
        return RGB_NAMES
    if set(RGB_NAMES) <= set(names):
        return RGB_NAMES
    return (names[0], names[1], names[2]) if len(names) >= 3 else (names[0],) * 3
