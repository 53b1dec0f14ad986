"""A server that lies, hangs, goes away and comes back."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from benchmarks.drill.job import Job
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
_AWAY_S = 3.0
_KEYS = {"data": {"fetch_timeout_s": 1.0, "fetch_attempts": 30, "outage_s": 20.0}}
"""A shard may be waited for longer than the server is away in the case in which the run goes on."""
_MAY_LOSE = 16
"""In an outage other samples stand in until all ranks have written a checkpoint (decision 48): those of four steps."""
HANGS = (Fault(times=1, stall_after=1000), Fault(times=1, trickle_after=1000), Fault(times=1, delay_s=5.0))


def run(setting: Setting) -> Iterator[Row]:
    """Each case is a job; the last one stops by itself and goes on."""
    setting.reference(STEPS)
    draws = setting.random("network")
    cases = ("lies", "hangs", "away for 3 s", "away until the run stops")
    for number, name in enumerate(cases[:1] if setting.short else cases):
        setting.now = f"network: {name}"
        job = setting.job(f"network-{number}", STEPS, _KEYS)
        if name == "lies":
            given, right = _faulty(setting, job, LIES, 2, draws)
        elif name == "hangs":
            given, right = _faulty(setting, job, HANGS, 1, draws)
        elif name == "away for 3 s":
            given, right = 1, _away(setting, job)
        else:
            given, right = 1, _outage(setting, job)
        if not right:
            say(f"network: {name}: exit codes {job.sessions[-1].codes}:\n{job.sessions[0].printed[-3000:]}")
        lasting = name == cases[-1]
        yield Row(
            "network", f"a server that {'is ' * (number > 1)}{name}", given, given * right,
            may_lose=_MAY_LOSE if lasting else 0, note="other samples stand in until the checkpoint" * lasting,
            **setting.losses(job, STEPS),
        )  # fmt: skip


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


def _away(setting: Setting, job: Job) -> bool:
    session = job.start(setting.plain)
    session.wait_for(lambda: session.steps() >= SAVE_EVERY)
    setting.server.__exit__()
    time.sleep(_AWAY_S)
    setting.server.__enter__()
    return set(session.end()) == {0}


def _outage(setting: Setting, job: Job) -> bool:
    """Without a server the run stops by itself, with a checkpoint; with it again it goes on."""
    session = job.start(setting.plain)
    session.wait_for(lambda: session.steps() >= SAVE_EVERY)
    setting.server.__exit__()
    try:
        session.end(240.0)
    finally:
        setting.server.__enter__()
    stopped = 0 not in session.codes and not any(code < 0 for code in session.codes)
    done = job.finish(setting.plain)
    taken = max(note["step"] for note in session.notes("step"))
    return stopped and set(done.codes) == {0} and {note["start"] for note in done.notes("begins")} == {taken}
