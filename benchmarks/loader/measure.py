"""Rates of all loaders, taken in turns, and seconds to the first batch of ours, as rows of the result."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import say
from benchmarks.loader.processes import FailedError, Worker, running
from benchmarks.loader.task import SAMPLES_PER_SHARD, Task

PEERS = {"litdata": "litdata", "streaming": "mosaicml-streaming"}
"""Variants that may need an interpreter of their own, and their distributions."""

STEP_SHARE = 0.75
"""Length of the simulated training step as a share of the bare decoder's time for a batch: two processes keep up."""

WARM_BATCHES = 10

LINK_BYTES_PER_S = 25e6
"""Speed of the slow server from which resuming is measured."""


@dataclass(frozen=True)
class Variant:
    """One loader in one setting: a row of the result."""

    name: str
    processes: int
    over: str = "local"
    """Where its shards are: "local", "http" (nothing cached yet) or "http, cached"."""
    environment: str = "main"

    @property
    def label(self) -> str:
        """Name in the plot."""
        where = "" if self.over == "local" else f", {self.over}"
        other = " in the peers' environment" if self.name == "bare" and self.environment != "main" else ""
        return (
            f"{self.name}{other}, {self.processes} processes{where}" if self.processes else f"{self.name}{other}{where}"
        )


def measure_rates(
    task: Task, url: str, options: argparse.Namespace, skipped: dict[str, str]
) -> tuple[list[dict[str, Any]], float]:
    """Measure all loaders in turns, in an order drawn anew each round; rows, and seconds of the simulated step."""
    here, peers = sys.executable, options.other_python or sys.executable
    apart = options.other_python is not None
    counts = [0, options.processes]
    variants = [Variant(name, n) for name in ("bare", "ours", "webdataset") for n in counts]
    variants += [Variant("ours", options.processes, "http"), Variant("ours", options.processes, "http, cached")]
    variants += [Variant("webdataset", options.processes, "http")]
    variants += [Variant("sequential", n, over) for over in ("local", "http") for n in counts]
    theirs = [name for name in PEERS if name not in skipped]
    variants += [Variant(name, n, environment="peers" if apart else "main") for name in theirs for n in counts]
    if apart and theirs:
        variants += [Variant("bare", n, environment="peers") for n in counts]
    remote = replace(task, root=url, shards=tuple(f"{url}/{Path(shard).name}" for shard in task.shards))
    found: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in variants}
    count = options.samples // task.batch
    step_s = 0.0
    with ExitStack() as stack:
        # One worker for each loader and number of processes: mosaicml-streaming hangs if it is forked after it has run.
        workers: dict[tuple[str, str, int], Worker] = {}
        for variant in variants:
            key = (variant.name, variant.environment, variant.processes)
            if key not in workers:
                workers[key] = stack.enter_context(running(peers if variant.environment == "peers" else here))
        order = random.Random(0)
        for round_ in range(options.rounds + 1):  # the first is a warm-up, and gives the length of the step
            for variant in [variants[0], *order.sample(variants[1:], len(variants) - 1)]:
                if variant.name in skipped:
                    continue
                cold = variant.over == "http" and variant.name == "ours"
                setting = replace(remote if variant.over != "local" else task, workers=variant.processes, cold=cold)
                warm = WARM_BATCHES
                if (
                    variant.name == "sequential"
                ):  # while windows grow, samples are read ahead faster than they are given
                    warm += task.window // task.batch
                request = {"variant": variant.name, "warm": 0 if cold else warm, "step_s": step_s}
                request |= {"count": count if round_ else max(1, count // 8)}
                request |= {"paced": max(1, count // 5) if variant.processes and round_ else 0}
                try:
                    result = workers[variant.name, variant.environment, variant.processes].ask(
                        "measure", task=asdict(setting), **request
                    )
                except FailedError as error:
                    if variant.name not in PEERS:
                        raise
                    skipped[variant.name] = str(error)
                    continue
                if round_:
                    found[variant].append(result)
                elif variant == variants[0]:
                    step_s = STEP_SHARE * result["cpu_s"] / request["count"]
            say(f"loader: round {round_} of {options.rounds}")
    samples = count * task.batch
    rows = [_row(variant, results, samples) for variant, results in found.items() if variant.name not in skipped]
    limits = {(r["environment"], r["processes"]): r["samples_per_core_s"] for r in rows if r["variant"] == "bare"}
    for row in rows:
        row["of_limit"] = row["samples_per_core_s"] / limits[row["environment"], row["processes"]]
    return rows, step_s


def _row(variant: Variant, results: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    cpu, wall = [result["cpu_s"] for result in results], [result["wall_s"] for result in results]
    waiting = [result["waiting"] for result in results if result["waiting"] is not None]
    return {
        "variant": variant.name,
        "over": variant.over,
        "processes": variant.processes,
        "environment": variant.environment,
        "label": variant.label,
        "samples_per_core_s": samples / min(cpu),
        "samples_per_core_s_median": samples / median(cpu),
        "samples_per_s": samples / min(wall),
        "samples_per_s_median": samples / median(wall),
        "waiting": min(waiting) if waiting else None,
        "waiting_median": median(waiting) if waiting else None,
        "cpu_s": cpu,
        "wall_s": wall,
    }


def measure_resume(
    task: Task, url: str, slow_url: str, large: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure the seconds to the first batch: local and HTTP, at the start and within an epoch, with many shards."""
    middle = options.images // 2 // task.batch
    many = options.state_shards * SAMPLES_PER_SHARD // 2 // task.batch
    remote = replace(task, root=url, shards=(f"{url}/{Path(task.shards[0]).name}",), cold=True)
    slow = replace(remote, root=slow_url, shards=(f"{slow_url}/{Path(task.shards[0]).name}",))
    cases = [("local", task, step) for step in (0, middle)] + [("http", remote, step) for step in (0, middle)]
    cases += [(f"http, {LINK_BYTES_PER_S / 1e6:.0f} MB/s", slow, middle)]
    cases += [(f"local, {options.state_shards} shards", replace(task, root=large), many)]
    rows = []
    with running(sys.executable) as worker:
        for where, setting, step in cases:
            repeats = options.rounds if setting is not slow else min(3, options.rounds)
            found = worker.ask("resume", task=asdict(setting), step=step, repeats=repeats)
            seconds = found["seconds"][1:] or found["seconds"]  # the first one imports
            shard = median(found["shard_seconds"]) if found["shard_seconds"] else 0.0
            row = {"over": where, "step": step, "seconds_median": median(seconds), "seconds_max": max(seconds)}
            rows.append(row | {"shard_s": shard, "cost_s": median(seconds) - shard})
    return rows
