"""Pictures of images of any bands, for people."""

from __future__ import annotations

from collections.abc import Sequence

from maskmatch_scale.data.images.bands import RGB_NAMES


def shown_channels(names: Sequence[str]) -> tuple[int, int, int]:
    """Which channels a picture shows as red, green and blue.

    Those with these names; else the first three; of one or two the first one, which makes a grey picture.

    Args:
        names: of the channels, at least one.
    """
    if set(RGB_NAMES) <= set(names):
        red, green, blue = (list(names).index(name) for name in RGB_NAMES)
        return red, green, blue
    return (0, 1, 2) if len(names) >= len(RGB_NAMES) else (0, 0, 0)
