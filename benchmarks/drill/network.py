"""A server that lies, hangs, goes away and comes back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.drill.job import Job, Session
from benchmarks.drill.report import Row
from benchmarks.drill.setting import SAVE_EVERY, Setting
from benchmarks.harness import say
from tests.data.faulty_server import Fault

STEPS = 10 * SAVE_EVERY
LIES = (
    Fault(times=1, wrong_bytes=True),
    Fault(times=1, cut_after=700),
    Fault(times=1, cut_after=0, reset=True),
    Fault(times=1, status=500),
    Fault(times=1, status=503),
    Fault(times=1, length_off_by=-100),
    Fault(times=1, length_off_by=100),
    Fault(times=1, no_length=True, cut_after=900),
)
HANGS = (Fault(times=1, stall_after=1000), Fault(times=1, trickle_after=1000), Fault(times=1, delay_s=5.0))
_AWAY_S = 3.0
_KEYS = {"data": {"fetch_timeout_s": 1.0, "fetch_attempts": 30, "outage_s": 20.0}}
"""A shard may be waited for longer than the server is away in the case in which the run goes on."""
_MAY_LOSE = 16
"""In an outage other samples stand in until all ranks have written a checkpoint (decision 48): those of four steps."""
_STOPS_S = 240.0
"""Within this time a run without a server must have stopped; four times what it may wait for, and its other waits."""


@dataclass(frozen=True)
class _Case:
    name: str
    give: Callable[[Setting, Job, random.Random], tuple[int, bool]]
    """Gives the faults: how many, and whether all was as it should be."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Of the section `run`."""
    may_lose: int = 0
    note: str = ""


def run(setting: Setting) -> Iterator[Row]:
    """Each case is a job."""
    setting.reference(STEPS)
    draws = setting.random("network")
    for number, case in enumerate(CASES[:1] if setting.short else CASES):
        setting.now = f"network: {case.name}"
        job = setting.job(f"network-{number}", STEPS, {**_KEYS, "run": case.keys})
        given, right = case.give(setting, job, draws)
        if not right:
            codes = [session.codes for session in job.sessions]
            say(f"network: {case.name}: exit codes {codes}:\n{job.sessions[0].printed[-3000:]}")
        figures = setting.losses(job, STEPS)
        yield Row("network", case.name, given, given * right, may_lose=case.may_lose, note=case.note, **figures)


def _lies(setting: Setting, job: Job, draws: random.Random) -> tuple[int, bool]:
    return _faulty(setting, job, LIES, 2, draws)


def _hangs(setting: Setting, job: Job, draws: random.Random) -> tuple[int, bool]:
    return _faulty(setting, job, HANGS, 1, draws)


def _faulty(setting: Setting, job: Job, faults: tuple[Fault, ...], each: int, draws: random.Random) -> tuple[int, bool]:
    """The first answers for each shard are faulty."""
    shards = [str(file.relative_to(setting.server.folder)) for file in setting.server.folder.rglob("*.tar")]
    before = len(setting.server.requests)
    setting.server.set_faults({shard: draws.sample(faults, each) for shard in shards})
    try:
        done = job.finish(setting.plain)
    finally:
        setting.server.set_faults({})
    asked = [request.path for request in setting.server.requests[before:]]
    return sum(min(each, asked.count(shard)) for shard in shards), set(done.codes) == {0}


def _away(setting: Setting, job: Job, draws: random.Random) -> tuple[int, bool]:
    """The server is away for a while, and the run goes on."""
    session = job.start(setting.plain)
    session.wait_for(lambda: session.steps() >= SAVE_EVERY)
    setting.server.__exit__()
    time.sleep(_AWAY_S)
    setting.server.__enter__()
    return 1, set(session.end()) == {0}


def _lost_in_training(setting: Setting, job: Job, draws: random.Random) -> tuple[int, bool]:
    session = job.start(setting.plain)
    session.wait_for(lambda: session.steps() >= SAVE_EVERY)
    return 1, _outage(setting, job, session)


def _lost_in_evaluation(setting: Setting, job: Job, draws: random.Random) -> tuple[int, bool]:
    shards = [file.name for file in setting.server.folder.glob("dev-*.tar")]
    setting.server.set_faults({shard: Fault(delay_s=0.5) for shard in shards})  # so that it is in the middle
    try:
        session = job.start(setting.plain)
        session.wait_for(lambda: bool(session.notes("evaluates")))
        return 1, _outage(setting, job, session)
    finally:
        setting.server.set_faults({})


def _outage(setting: Setting, job: Job, session: Session) -> bool:
    """Without a server the run stops by itself, with a checkpoint; with it again it goes on."""
    setting.server.__exit__()
    try:
        session.end(_STOPS_S)
    finally:
        setting.server.__enter__()
    stopped = 0 not in session.codes and not any(code < 0 for code in session.codes)
    done = job.finish(setting.plain)
    taken = max(note["step"] for note in session.notes("step"))
    return stopped and set(done.codes) == {0} and {note["start"] for note in done.notes("begins")} == {taken}


CASES = (
    _Case("a server that lies", _lies),
    _Case("a server that hangs", _hangs),
    _Case("a server that is away for 3 s", _away),
    _Case(
        "a server that is away until the run stops",
        _lost_in_training,
        {"evaluate_every": 0},
        _MAY_LOSE,
        "other samples stand in until the checkpoint",
    ),
    _Case("the same, in an evaluation", _lost_in_evaluation),
)
