"""Time of a step: ranks of one host, and of two hosts with slow or lossy links, at ZeRO stages 1–3.

While a run over two hosts goes on, its links are changed again and again. So all speeds are measured in turn.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from statistics import median

from benchmarks.drill_hosts.hosts import Hosts
from benchmarks.drill_hosts.launching import Job, Start
from benchmarks.drill_hosts.report import Link, Steps
from benchmarks.harness import say
from benchmarks.small_runs import records
from maskmatch_scale.models import build_segmenter

LINKS = tuple(Link(mbit) for mbit in (None, 500.0, 200.0, 50.0))
LOSSY = tuple(Link(None, loss, single=True) for loss in (0.0, 0.001, 0.01))
"""At stages 1 and 3."""
_ROUNDS, _STEPS, _SETTLE = 3, 2, 1
"""Rounds over all links; steps of each that count; steps after a change that do not, beside the one it comes in."""
_ON_ONE_HOST, _FIRST = 8, 2
"""Steps of the runs on one host that count, and steps before them."""
_BACKBONE = "transformers/segformer-b0"
_CLASSES = 3


def run(work: Path, shards: Path, *, short: bool) -> Iterator[Steps]:
    """One rank per core: on one host with all cores, and on two hosts with one core each."""
    parameters = sum(p.numel() for p in build_segmenter(_BACKBONE, _CLASSES).parameters())
    for stage in (3,) if short else (1, 3, 2):
        links = LINKS[1:2] if short else LINKS if stage == 2 else (*LINKS, *LOSSY)
        yield from _two_hosts(_job(work / f"steps-{stage}-hosts", shards, stage), stage, links, parameters, short)
    for stage in (3,) if short else (1, 3, 2):
        for ranks in (1,) if short else (1, 2, 4):
            job = _job(work / f"steps-{stage}-{ranks}", shards, stage)
            with Hosts(1) as hosts:
                say(f"steps: stage {stage}, {ranks} ranks on one host")
                start = job.start([hosts[0]], slots=ranks)
                _wait(start, job, _FIRST + _ON_ONE_HOST)
                start.kill()
            seconds = [record["step_s"] for record in records(job.run)][_FIRST:]
            yield Steps(
                ranks, 1, stage, None, 0.0, False, median(seconds), min(seconds), len(seconds), None, parameters
            )


def _job(folder: Path, shards: Path, stage: int) -> Job:
    sections = {
        "model": {"backbone": _BACKBONE, "backbone_options": {}},
        "engine": {"zero_stage": stage, "collective_timeout_s": 300},
        "run": {"steps": 100_000, "evaluate_every": 0, "checkpoint_every": 100_000},
    }
    return Job(folder, shards, sections)


def _two_hosts(job: Job, stage: int, links: tuple[Link, ...], parameters: int, short: bool) -> Iterator[Steps]:
    seconds: dict[Link, list[float]] = defaultdict(list)
    sent: dict[Link, list[int]] = defaultdict(list)
    order = random.Random(0)
    say(f"steps: stage {stage}, two hosts")
    with Hosts(2, own_cores=True) as hosts:
        hosts.send_larger_packets()
        start = job.start(list(hosts))
        _wait(start, job, _FIRST)
        for _ in range(1 if short else _ROUNDS):
            for link in order.sample(links, len(links)):
                for host in hosts:
                    host.set_link(link.mbit, link.loss, single=link.single)
                # The step in which the link changes, and the next, do not count.
                first = job.steps() + 1 + _SETTLE
                _wait(start, job, first)
                before = sum(host.sent_bytes() for host in hosts)
                _wait(start, job, first + _STEPS)
                sent[link].append((sum(host.sent_bytes() for host in hosts) - before) // _STEPS)
                seconds[link] += [
                    record["step_s"] for record in records(job.run) if first < record["step"] <= first + _STEPS
                ]
        start.kill()
    for link in links:
        times = seconds[link]
        yield Steps(
            2, 2, stage, *astuple(link), median(times), min(times), len(times), int(median(sent[link])), parameters
        )


def _wait(start: Start, job: Job, step: int) -> None:
    if not start.wait_for(lambda: job.steps() >= step, 600.0) or not start.running:
        raise RuntimeError(f"step {step} was not reached:\n{start.printed[-3000:]}")
