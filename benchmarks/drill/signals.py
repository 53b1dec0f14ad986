"""Storms of SIGTERM and SIGUSR1: the run stops with a checkpoint and exit code 75, and no step is done twice."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator

from benchmarks.drill.job import WITHOUT, Session
from benchmarks.drill.report import Row
from benchmarks.drill.setting import SAVE_EVERY, Setting
from benchmarks.harness import say
from maskmatch_scale.errors import RESUMABLE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_STEPS = 12
"""For each storm: far more than a storm lasts."""


def run(setting: Setting) -> Iterator[Row]:
    """Stop one job by several signals at a time, under each launcher, and let it finish."""
    storms = [(launcher, "rank") for launcher in setting.launchers]
    if not setting.short:
        storms += [(launcher, "ranks") for launcher in setting.launchers]
        storms += [(launcher, "launcher") for launcher in setting.launchers if launcher not in WITHOUT]
    steps = _STEPS * (len(storms) + 1) // SAVE_EVERY * SAVE_EVERY
    setting.reference(steps)
    job, draws = setting.job("signals", steps), setting.random("signals")
    given = survived = 0
    for number, (launcher, whom) in enumerate(storms):
        setting.now = f"signals: storm {number + 1} of {len(storms)}"
        session = job.start(launcher)
        wanted = draws.randint(1, _STEPS // 2)
        session.wait_for(lambda session=session, wanted=wanted: session.steps() >= wanted)  # type: ignore[misc]
        given += _storm(session, whom, draws)
        session.end(120.0)
        problem = _problem(session)
        if problem:
            say(f"signals: {launcher}, {whom}: {problem}\n{session.printed[-3000:]}")
        else:
            survived += 1
    finished = set(job.finish(setting.launchers[0]).codes) == {0}
    figures = setting.losses(job, steps)
    for before, after in zip(job.sessions, job.sessions[1:], strict=False):
        taken = max((note["step"] for note in before.notes("step")), default=None)
        begun = {note["start"] for note in after.notes("begins")}
        if taken is not None and begun != {taken}:
            say(f"signals: session {before.number} took {taken} steps, the next one began after {begun}")
            survived -= 1
    note = f"{given} signals; exit code {RESUMABLE}"
    yield Row("signal", "storms of SIGTERM and SIGUSR1", len(storms), survived * finished, note=note, **figures)


def _storm(session: Session, whom: str, draws: random.Random) -> int:
    """Send two to five signals within a second, at least two of them to the same process; how many."""
    ranks = session.ranks()
    if whom == "rank":
        victims = [ranks[draws.choice(sorted(ranks))]]
    elif whom == "ranks":
        victims = list(ranks.values())
    else:  # a scheduler may signal the first process of a job alone
        victims = [session.first]
    sent = draws.randint(2, 5)
    for number in range(sent):
        session.signal(draws.choice(SIGNALS), victims)
        if number:  # the first two come in a row
            time.sleep(draws.uniform(0.0, 0.25))
    return sent


def _problem(session: Session) -> str:
    """What is not as it should be of the end of a session; nothing if all is."""
    if set(session.codes) != {RESUMABLE}:
        return f"exit codes {session.codes}"
    return "" if "--resume" in session.printed else "no line says how to go on"
