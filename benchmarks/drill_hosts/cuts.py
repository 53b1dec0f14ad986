"""Runs over two hosts against the same run on one, and runs of which a host is cut off.

The hosts share their files also while one is cut off: what is cut is the network alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.drill_hosts.hosts import Host, Hosts
from benchmarks.drill_hosts.launching import Job, Start
from benchmarks.drill_hosts.report import Cut
from benchmarks.harness import say
from benchmarks.small_runs import compare_losses, compare_states

LIMIT_S = 30
STEPS, CUT_AFTER, ALONE = 18, 7, 4
"""Of a run; when the host is cut off; how many the other host then does alone."""
_SHORT_S = 6.0
"""A cut that is over before the limit."""
_TOLERANCE = 1e-6
"""Of fp32 losses, relative, where the number of ranks changes."""
_ERROR = re.compile(r"maskmatch: error: (rank \d+: .*)")


@dataclass(frozen=True)
class _Case:
    name: str
    launcher: str = "deepspeed"
    slots: int = 1
    origin: int = 0
    """Which host the launcher is started on; 2 is a host without ranks."""
    lost: int | None = None
    kill: bool = False
    """Its processes are killed instead, as if it had been switched off and on again."""
    back_after_s: float | None = None
    """The cut is over so soon; None: not before everything has ended."""
    alone: bool = False
    """The other host goes on alone before both do."""
    silent: bool = False
    """The host that the launcher is on is the lost one: what names it is in the log of the other host's rank."""


CASES = (
    _Case("deepspeed --hostfile, pdsh and ssh"),
    _Case("cut off, and back", lost=1),
    _Case("cut off with rank 0, launched from a third host; the other goes on alone", lost=0, origin=2, alone=True),
    _Case("cut off with rank 0 and the launcher; the other goes on alone", lost=0, alone=True, silent=True),
    _Case("all its processes killed", lost=1, kill=True),
    _Case("cut off for 6 s", lost=1, back_after_s=_SHORT_S),
    _Case("torchrun on each host", launcher="torchrun"),
    _Case("deepspeed --no_ssh on each host", launcher="deepspeed --no_ssh"),
    _Case("cut off, two ranks each", slots=2, lost=1),
)


def run(work: Path, shards: Path, *, short: bool) -> Iterator[Cut]:
    """Each case is a job, on two hosts; a third one has no ranks."""
    references: dict[int, Job] = {}
    with Hosts(3) as hosts:
        for number, case in enumerate((*CASES[:2], CASES[4]) if short else CASES):
            if case.slots not in references:
                folder = work / f"one-host-{case.slots}"
                references[case.slots] = _reference(folder, shards, hosts[0], case.slots)
            say(f"cuts: {case.name}")
            job = _job(work / f"cut-{number}", shards, case.slots)
            yield _take(case, job, references[case.slots], hosts)


def _job(folder: Path, shards: Path, slots: int) -> Job:
    sections = {
        # The order of samples is cut for four ranks at most, whatever their number. Every pixel counts: at a threshold
        # a confidence that differs in its last bit would change the loss by a whole pixel.
        "data": {"lanes": 4},
        "method": {"threshold": 0.0},
        "engine": {"micro_batch": 4 // (2 * slots), "zero_stage": 3, "collective_timeout_s": LIMIT_S},
        "run": {"steps": STEPS, "evaluate_every": 0, "keep_last": 1000},
    }
    return Job(folder, shards, sections)


def _reference(folder: Path, shards: Path, host: Host, slots: int) -> Job:
    """The same run with as many ranks on one host."""
    say(f"the run on one host, {2 * slots} ranks")
    job = _job(folder, shards, slots)
    start = job.start([host], slots=2 * slots)
    start.end()
    if start.codes != {0}:
        raise RuntimeError(f"the run on one host has failed:\n{start.printed[-3000:]}")
    return job


def _take(case: _Case, job: Job, reference: Job, hosts: Hosts) -> Cut:
    both = [hosts[0], hosts[1]]
    start = job.start(both, slots=case.slots, origin=hosts[case.origin], launcher=case.launcher)
    left, ended_s, line = 0, None, None
    lost = None if case.lost is None else hosts[case.lost]
    if lost is not None:
        start.wait_for(lambda: job.steps() >= CUT_AFTER)
        began = time.monotonic()
        if case.kill:
            start.signal_ranks(lost, "KILL")
        else:
            lost.cut()
        if case.back_after_s is not None:
            time.sleep(case.back_after_s)
            lost.join()
        else:
            left += start.end(240.0)
            ended_s = time.monotonic() - began
            lost.join()
            line = _line_about(lost, start, job, case)
            if case.alone:
                (other,) = (host for host in both if host is not lost)
                left += _go_on_alone(job, other, case)
            start = job.start(both, slots=case.slots, origin=hosts[case.origin], launcher=case.launcher)
    left += start.end()
    went_on = start.codes == {0} and job.steps() == STEPS
    if not went_on:
        say(f"{case.name}: exit codes {start.codes}:\n{start.printed[-3000:]}")
    weights = float("inf")
    if job.checkpoint(STEPS).is_dir():
        weights = compare_states(job.checkpoint(STEPS), reference.checkpoint(STEPS))
    return Cut(
        case.name,
        ranks=f"{case.slots}+{case.slots}",
        launched_from=hosts[case.origin].name if case.launcher == "deepspeed" else "each host",
        lost=None if lost is None else lost.name,
        limit_s=LIMIT_S,
        ended_s=None if ended_s is None else round(ended_s, 1),
        named=None if ended_s is None else line is not None,
        went_on=went_on,
        steps=STEPS,
        losses=compare_losses(job.run, reference.run, STEPS),
        weights=weights,
        left=left,
        tolerance=_TOLERANCE if case.alone else 0.0,
        note="named in the log of the other host's rank" if case.silent else "",
        line=line or "",
    )


def _line_about(lost: Host, start: Start, job: Job, case: _Case) -> str | None:
    """The first line of a rank that names the host which was lost; None: there is none."""
    if case.silent:
        logs: Sequence[Path] = sorted((job.run / "log").glob("rank-*.txt"))
        printed = "\n".join(path.read_text(errors="replace") for path in logs)
        lines = [line.partition(" ERROR ")[2] for line in printed.splitlines()]
    else:
        lines = [match[1] for match in _ERROR.finditer(start.printed)]
    return next((line for line in lines if f"host {lost.name}" in line), None)


def _go_on_alone(job: Job, other: Host, case: _Case) -> int:
    """A few steps on one host, with the same global batch; returns how many processes had not ended."""
    done = job.steps()
    start = job.start([other], f"run.steps={done + ALONE}", "engine.micro_batch=4")
    left = start.end()
    if start.codes != {0}:
        say(f"{case.name}, alone: exit codes {start.codes}:\n{start.printed[-3000:]}")
    return left
