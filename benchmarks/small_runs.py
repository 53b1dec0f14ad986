"""Small runs that have every part of a real one, and what two of them differ in: what the drills share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from maskmatch_scale.checkpoints.reading import StoredTensors
from maskmatch_scale.data.writing import write_shards
from tests.conftest import TINY_SEGFORMER, ShapesSource

SAMPLES = {"labelled": 16, "unlabelled": 40, "dev": 8, "val": 2}

RECIPE: dict[str, dict[str, Any]] = {
    # A few shards fit into the cache, so that some are fetched all the time.
    "data": {"crop_px": 64, "workers": 1, "shuffle_window": 8, "cache_gb": 0.001, "fetch_timeout_s": 5.0},
    "model": {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER},
    "method": {"scales": [1.0], "threshold": 0.3},
    # A constant rate: so a shorter run does the same steps as a longer one, and one run is compared with all.
    "optim": {"lr": 1e-3, "schedule": "constant"},
    "engine": {"micro_batch": 1, "threads": 1, "precision": "fp32", "zero_stage": 1, "collective_timeout_s": 120},
    "run": {"checkpoint_every": 3, "evaluate_every": 4, "log_every": 1, "keep_best": 0},
}
"""Of a run, without its place, its data and its steps. Two ranks take one labelled and one unlabelled image each. The
smallest model that has every part."""


def write_samples(folder: Path) -> None:
    """Write the shards: four samples each."""
    write_shards(ShapesSource(SAMPLES), folder, workers=1, samples_per_shard=4, progress=False)


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; a last line that was cut off is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [r for r in map(json.loads, (line for line in lines if line.endswith(b"\n"))) if r["kind"] == kind]


def compare_losses(ours: Path, theirs: Path, steps: int) -> float:
    """The largest relative difference of the losses of two runs; infinite if a step has no record.

    Of several records of a step, the last one counts.

    Args:
        ours: run directory.
        theirs: the other one's.
        steps: that both have taken.
    """
    mine, right = ({record["step"]: record["loss"] for record in records(run)} for run in (ours, theirs))
    if not all(step in mine and step in right for step in range(1, steps + 1)):
        return float("inf")
    return max(abs(mine[step] - right[step]) / abs(right[step]) for step in range(1, steps + 1))


def compare_states(ours: Path, theirs: Path, kinds: tuple[str, ...] = ()) -> float:
    """The relative difference of the tensors of two checkpoints, all elements together: 0 if all bits are the same.

    It is ‖ours - theirs‖ / ‖theirs‖. Single tensors may differ wholly: a key's bias in attention has a gradient that is
    zero but for rounding, so what AdamW makes of it is rounding too.

    Args:
        ours: folder of a checkpoint.
        theirs: the other one's.
        kinds: `student`, `ema`, …; none: all, moments too.

    Returns:
        Infinite if one has a tensor that the other has not, or of another shape.
    """
    mine, right = StoredTensors(ours), StoredTensors(theirs)
    names = {name for name in right.names() if not kinds or name.split("/")[0] in kinds}
    if names != {name for name in mine.names() if not kinds or name.split("/")[0] in kinds}:
        return float("inf")
    same, difference, size = True, 0.0, 0.0
    for name in names:
        a, b = mine.read(name), right.read(name)
        if mine.shape(name) != right.shape(name) or a.dtype != b.dtype:
            return float("inf")
        same = same and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        difference += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    # Other bits are a difference, also where the numbers are equal or no numbers.
    relative = math.sqrt(difference / max(size, 1e-30)) if math.isfinite(difference) else float("inf")
    return 0.0 if same else max(relative, 1e-30)
