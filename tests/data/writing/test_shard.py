"""Cutting streams into shards. How a shard is written: `test_write.py`."""

from __future__ import annotations

from maskmatch_scale.data.writing import StreamItems
from maskmatch_scale.data.writing.shard import cut


def test_ten_million_items_are_cut_quickly() -> None:
    shards = cut("many", StreamItems(False, range(10_000_000)), 256)
    assert (len(shards), sum(map(len, shards))) == (39_063, 10_000_000)
