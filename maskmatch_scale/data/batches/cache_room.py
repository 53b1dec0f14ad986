"""Whether the cache of remote shards has room for what the ranks of this machine read at a time."""

from __future__ import annotations

import math

import numpy as np

from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.order.source import WeightedSource
from maskmatch_scale.data.remote.cache_place import describe
from maskmatch_scale.data.shards.folder import fetch_options


def cache_lines(batches: TrainingBatches, local_ranks: int) -> list[str]:
    """What is said about the cache when a run starts; nothing if all shards are on this machine.

    Args:
        batches: of a rank.
        local_ranks: ranks on this machine.
    """
    sources = [
        source
        for side in (batches.labelled, batches.unlabelled)
        for source in (side.indexed if side is not None else ())
        if source.is_remote
    ]
    if not sources:
        return []
    data = batches.recipe.data
    lines = [f"fetched shards are kept in {describe(fetch_options(data).cache)}, up to {data.cache_gb:g} GB"]
    lanes = min(batches.lanes, -(-local_ranks * batches.lanes // batches.world_size))
    needed = sum(_bytes_at_a_time(source, data.shuffle_window, lanes, batches.lanes) for source in sources)
    if needed > data.cache_gb * 1e9:
        lines.append(
            f"warning: data.cache_gb={data.cache_gb:g} is too small: the windows of {lanes} lane"
            f"{'s' if lanes > 1 else ''} on this machine need {needed / 1e9:.3g} GB of shards at a time, which would "
            f"be fetched again and again; set data.cache_gb={_rounded_up(needed / 1e9)}, or a smaller "
            "data.shuffle_window"
        )
    return lines


def _bytes_at_a_time(source: WeightedSource, window: int, lanes: int, all_lanes: int) -> float:
    """Bytes of the shards of two windows of each lane: the one that is read, and the next one, which is fetched.

    Args:
        source: whose shards.
        window: its samples.
        lanes: on this machine.
        all_lanes: of the job.
    """
    used = source.sizes > 0
    sizes = source.stream.shards.bytes[used]
    known = sizes[sizes > 0]
    if not len(known):
        return 0.0
    samples = source.info.samples
    of_two_windows = 2 * min(window, samples / all_lanes) * len(sizes) / samples + 1  # one is begun by another lane
    return float(np.mean(known)) * min(lanes * of_two_windows, len(sizes))


def _rounded_up(gigabytes: float) -> str:
    """To two digits, so that nothing is missing."""
    unit = 10.0 ** (math.floor(math.log10(gigabytes)) - 1)
    return f"{math.ceil(gigabytes / unit) * unit:.6g}"
