"""Channel dropout of features, by seeds that were drawn with the views: nothing is drawn on the device.

So an image's channels depend on (seed, position) alone, not on its batch or rank, and a recomputed forward drops the
same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskmatch_scale.method.views import hash32


def coins(seeds: Tensor, stream: int, count: int) -> Tensor:
    """Fair coins that depend on (seed, stream, place) alone, made where the seeds are (a hash of counters).

    The first coins of a longer row are those of a shorter one.

    Args:
        seeds: int64 (U,), 0 to 2³² - 1, such as `Drawn.feature_seeds`.
        stream: rows of different streams are independent of each other; 0 to 4095.
        count: coins for each seed, at most 2²⁰.

    Returns:
        bool (U, count).
    """
    counter = (stream << 20) + torch.arange(count, device=seeds.device)
    return hash32(hash32(seeds)[:, None] ^ hash32(counter)) < 2**31


def times_channels(features: Tensor, factors: Tensor) -> Tensor:
    """Multiply each channel of each image by its factor.

    Args:
        features: (U, C, h, w), one level as `Base.perturb` is given it.
        factors: (U, C).

    Returns:
        A new tensor of the features' shape and dtype.
    """
    return features * factors.to(features.dtype)[:, :, None, None]
