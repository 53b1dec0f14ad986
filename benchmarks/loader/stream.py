"""What is measured of our training batches alone: memory over a long run, resuming, the state, large indexes."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.loader.simulated import simulated_index
from benchmarks.loader.task import SAMPLES_PER_SHARD, Task
from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.recipe import Recipe, parse_recipe

_SEED = 1


def _recipe(task: Task, micro_batch: int, *, sequential: bool = False) -> Recipe:
    data: dict[str, Any] = {
        "root": task.root,
        "labelled_count": 0,
        "crop_px": task.crop_px,
        "shuffle_window": task.window,
        "workers": task.workers,
        "cache_dir": task.cache,
    }
    if sequential:
        names = ",".join(Path(shard).name for shard in task.shards)
        data["unlabelled"] = [{"shards": f"{task.root}/{{{names}}}"}]
    return parse_recipe(
        {
            "data": data,
            "model": {"backbone": "timm/vit_tiny_patch16_224", "pretrained": "not read here"},
            "method": {"burn_in": 0},
            "engine": {"micro_batch": micro_batch},
            "run": {"dir": "not written here", "steps": 1 << 30, "seed": _SEED},
        }
    )


def make_batches(
    task: Task, world_size: int = 1, index: ShardIndex | None = None, *, sequential: bool = False
) -> TrainingBatches:
    """The training batches of rank 0; no labelled images, `task.batch` unlabelled ones a step and rank.

    With ``sequential`` their shards are read in sequence, as if they had no index.
    """
    recipe = _recipe(task, task.batch, sequential=sequential)
    return TrainingBatches(recipe, 2, 0, world_size, unlabelled=True, index=index)


def _pss_mb() -> float:
    """Memory of this process and its loader processes (PSS); shared pages count once."""
    here = psutil.Process()
    return sum(process.memory_full_info().pss for process in (here, *here.children(recursive=True))) / 1e6


def memory(task: Task, samples: int, points: int) -> list[dict[str, Any]]:
    """Memory while a consumer takes ``samples`` samples, measured ``points`` times."""
    steps = samples // task.batch
    every = max(1, steps // points)
    rows = []
    for step, _ in enumerate(load_batches(make_batches(task), 0, steps)):
        if step % every == 0:
            rows.append({"samples": step * task.batch, "pss_mb": _pss_mb()})
    return rows


def resume(task: Task, step: int, repeats: int) -> dict[str, Any]:
    """Seconds from the start to the first batch after ``step`` steps, and of the plain download of one shard."""
    state = json.loads(json.dumps(make_batches(task).state(step)))
    seconds, plain = [], []
    for _ in range(repeats):
        if task.cold:
            shutil.rmtree(task.cache, ignore_errors=True)
            begin = time.perf_counter()
            with urllib.request.urlopen(task.shards[0]) as answer:
                while answer.read(1 << 20):
                    pass
            plain.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        stream = make_batches(task)
        stream.resume(state)
        made = load_batches(stream, step, 1 << 30)
        next(made)
        seconds.append(time.perf_counter() - begin)
        made.close()
    return {"step": step, "seconds": seconds, "shard_seconds": plain}


def state_bytes(task: Task, shards: int, ranks: int, changes: int) -> list[dict[str, Any]]:
    """Bytes of the state of a job whose number of ranks changes ``changes`` times within an epoch."""
    index = ShardIndex.parse(b"".join(simulated_index(shards, "{:08d}.tar")), "simulated")
    local = replace(task, root="simulated", batch=1)
    fewer = ranks * 3 // 4
    stream, step = make_batches(local, ranks, index), 0
    rows = [{"shards": shards, "ranks": ranks, "changes": 0, "bytes": len(json.dumps(stream.state(0)))}]
    for change in range(1, changes + 1):
        # A tenth of the epoch later, and not at a round number, so that every lane has samples left.
        step += shards * SAMPLES_PER_SHARD // 10 // ranks + 7
        state = stream.state(step)
        stream = make_batches(local, fewer if change % 2 else ranks, index)
        stream.resume(json.loads(json.dumps(state)))
        size = len(json.dumps(stream.state(step + 1)))
        rows.append({"shards": shards, "ranks": ranks, "changes": change, "bytes": size})
    return rows


def index(task: Task, path: str) -> dict[str, Any]:
    """Seconds and memory of reading a large index and of computing the first epoch's order, in a fresh process."""
    before, begin = _peak_mb(), time.perf_counter()
    loaded = ShardIndex.load(path)
    load_s = time.perf_counter() - begin
    begin = time.perf_counter()
    stream = make_batches(replace(task, root=path), 1, loaded)
    stream_s = time.perf_counter() - begin
    assert stream.unlabelled is not None
    (source,) = stream.unlabelled.sources
    begin = time.perf_counter()
    source.order(0, 1)
    order_s = time.perf_counter() - begin
    begin = time.perf_counter()
    for step in range(-(-1000 // task.batch)):
        for _, place in stream.places(stream.unlabelled, step):
            source.locate(place)
    places_s = time.perf_counter() - begin
    return {
        "shards": len(loaded.stream("unlabelled").shards),
        "load_s": load_s,
        "peak_mb": _peak_mb(),
        "peak_mb_before": before,
        "stream_s": stream_s,
        "order_s": order_s,
        "places_s": places_s,
    }


def _peak_mb() -> float:
    """Largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) * 1024 / 1e6
