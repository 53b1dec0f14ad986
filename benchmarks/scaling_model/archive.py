"""A billion unlabelled images: shards, index, what a checkpoint says of the data, and what the store is asked for.

Sizes of indexes are those measured for a million shards (benchmarks/results/scale.json), in proportion.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.harness import ROOT
from maskmatch_scale.planning.efficiency import DECODED_A_CORE, DECODED_BYTES

IMAGES = 1_000_000_000
LANE_BYTES = 30
"""Of a lane in a checkpoint's `stream.json`, after a change of the mix (docs/streaming.md)."""
SAMPLES_A_SHARD = (256, 1_000, 10_000)
"""The writer's default, and what others write."""


def shards() -> list[dict[str, Any]]:
    """A row for each size of shards."""
    scale = json.loads((ROOT / "benchmarks/results/scale.json").read_text(encoding="utf-8"))
    per, opening = (
        scale["machine"]["shards"],
        {(r["index"], r["over"], r["shared"], r["process"]): r for r in scale["rows"]},
    )
    first = opening["table", "local", "on", "first"]
    (node,) = [row for row in scale["node"] if row["index"] == "table" and row["shared"] == "on"]
    found = []
    for samples in SAMPLES_A_SHARD:
        count = IMAGES / samples
        found.append(
            {
                "samples_a_shard": samples,
                "shards": round(count),
                "shard_mb": samples * DECODED_BYTES / 1e6,
                "data_tb": IMAGES * DECODED_BYTES / 1e12,
                "table_mb": scale["machine"]["table_mb"] * count / per,
                "open_first_s": first["wall_s"] * count / per,
                "node_memory_mb": node["extrapolated_mb"] * count / per,
            }
        )
    return found


def demand(weak: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the loaders of a cluster ask for, a row for each row of weak scaling; one sample of two is unlabelled."""
    found = []
    for row in weak:
        rate = row["images_per_s"]
        found.append(
            {
                "model": row["model"],
                "zero_stage": row["zero_stage"],
                "gpus": row["gpus"],
                "images_per_s": rate,
                "store_gb_s": rate * DECODED_BYTES / 1e9,
                **{f"requests_per_s_{samples}": rate / samples for samples in SAMPLES_A_SHARD},
                "decode_cores_a_gpu": rate / row["gpus"] / DECODED_A_CORE,
                "days_for_all": IMAGES / (rate / 2) / 86400,
                "state_kb": LANE_BYTES * row["gpus"] / 1e3,
            }
        )
    return found
