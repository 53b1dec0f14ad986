"""Input channels of a segmenter: their names, the statistics they are normalised by, and pretrained stems for them.

Decision: docs/decisions/0083-other-channels-than-rgb.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from timm.models import adapt_input_conv
from torch import Tensor

COLOURS = ("red", "green", "blue")
"""Names of the channels that pretrained weights were made for, in their order."""
OPTIONS = ("in_chans", "num_channels")
"""Options of timm and of transformers that say how many channels there are."""


def channel_names(channels: int | Sequence[str]) -> tuple[str, ...]:
    """Names of input channels that are given by their number or their names.

    Raises:
        ValueError: there are none, or two have one name.
    """
    if not isinstance(channels, int):
        names = tuple(channels)
    else:
        names = COLOURS if channels == len(COLOURS) else tuple(f"channel {number}" for number in range(channels))
    if not names or len(set(names)) < len(names):
        raise ValueError(f"in_channels: {channels!r}; it must be a number from 1, or names that differ")
    return names


def statistics_of(names: Sequence[str], of_colours: Sequence[float]) -> tuple[float, ...]:
    """A mean or standard deviation a channel, of those of red, green and blue.

    Channels with the name of a colour take its value, all others the mean of the three.

    Args:
        names: of the channels.
        of_colours: of red, green and blue, in 0–1; a single one, of weights for grey images, serves for all.
    """
    other = sum(of_colours) / len(of_colours)
    known = dict(zip(COLOURS, of_colours)) if len(of_colours) == len(COLOURS) else {}
    return tuple(known.get(name, other) for name in names)


def adapted_line(name: str, stored: int, channels: int) -> str:
    """A line for people on a stem whose weights were adapted.

    Args:
        name: of the tensor.
        stored: channels that it was made for.
        channels: that the model has.
    """
    how = "the sum over its channels" if channels == 1 else f"its channels in turn, times {stored}/{channels}"
    return f"stem: {stored} → {channels} channels: {how}, as timm does ({name})"


def adapt_stem(
    state: Mapping[str, Tensor], current: Mapping[str, Tensor], channels: int
) -> tuple[dict[str, Tensor], str | None]:
    """Weights with the stem, the first convolution, adapted to another number of channels by timm's rule.

    Args:
        state: what is loaded, in a segmenter's names.
        current: of the segmenter that it is loaded into.
        channels: of that segmenter.

    Returns:
        The weights, and a line on what was adapted; None: the stem fits, or differs in more than its channels.
    """
    for name, value in state.items():
        own = current.get(name)
        if not name.startswith("backbone.") or own is None or own.ndim != 4 or value.ndim != 4 or value.is_meta:
            continue
        stored, without = value.shape[1], (value.shape[0], *value.shape[2:])
        if own.shape[1] == channels != stored and (own.shape[0], *own.shape[2:]) == without:
            adapted = adapt_input_conv(channels, value, base_chans=stored)
            return {**state, name: adapted}, adapted_line(name, stored, channels)
    return dict(state), None
