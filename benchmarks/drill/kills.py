"""SIGKILL again and again: of a rank, of all ranks, of the launcher too, at random moments and at chosen ones."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.drill.job import WITHOUT, Job, Session
from benchmarks.drill.report import Row
from benchmarks.drill.setting import SAVE_EVERY, Setting
from benchmarks.harness import say
from tests.data.faulty_server import Fault, FaultyServer

MOMENTS = ("start", "step", "save", "fetch", "evaluation")
"""start: at any time from the launch to a few seconds after the first step. The others: in the middle of it."""
WHOM = ("rank", "ranks", "all")
"""One rank, so that the others and the launcher must end by themselves; all ranks and their loader processes; and the
launcher with them."""

_ENDS_S = 60.0
"""Within this time the others must have ended."""
_STEPS = 2 * SAVE_EVERY
"""Of the run, for each kill."""


@dataclass
class Kill:
    """One kill, and what came of it."""

    moment: str
    whom: str
    launcher: str
    in_the_middle: bool = False
    """Whether it was the moment that was meant: what it interrupted is unfinished."""
    ended: bool = True
    """Whether the others ended by themselves, where they had to."""


def run(setting: Setting) -> Iterator[Row]:
    """Kill one job until `--kills` are reached, then let it finish."""
    steps = _STEPS * setting.kills
    setting.reference(steps)
    job, draws = setting.job("kills", steps), setting.random("kills")
    began = time.monotonic()
    plan = _plan(setting, draws)
    kills: list[Kill] = []
    finished = False
    while len(kills) < setting.kills and not finished:
        kill = plan[len(kills)]
        session = job.start(kill.launcher)
        # At the latest after this step, so that a fast run does not end before its last kill.
        latest = steps - SAVE_EVERY * (setting.kills - len(kills))
        finished = not _kill(setting, job, session, kill, draws, latest)
        if not finished:
            kills.append(kill)
        done = max((note["step"] for note in job.notes("step")), default=0)
        setting.now = f"kills: {len(kills)} of {setting.kills}, step {done} of {steps}"
    if not finished:
        finished = set(job.finish(setting.launchers[0]).codes) == {0}
    figures = setting.losses(job, steps)
    hits = Counter(kill.moment for kill in kills if kill.in_the_middle)
    say(f"kills: {time.monotonic() - began:.0f} s; in the middle: {dict(hits)}")
    for whom in WHOM:
        of_whom = [kill for kill in kills if kill.whom == whom]
        given = Counter(kill.moment for kill in of_whom)
        note = ", ".join(f"{given[moment]} {moment}" for moment in MOMENTS if given[moment])
        yield Row("kill", whom, len(of_whom), sum(kill.ended for kill in of_whom) * finished, note=note)
    note = ", ".join(f"{hits[moment]} in the middle of {_an(moment)}" for moment in MOMENTS[2:])
    yield Row("kill", "the whole job", len(kills), len(kills) * finished, note=note, **figures)


def _an(moment: str) -> str:
    return f"an {moment}" if moment == "evaluation" else f"a {moment}"


def _plan(setting: Setting, draws: random.Random) -> list[Kill]:
    """Every kind about equally often, in random order."""

    def columns(kinds: tuple[str, ...]) -> list[str]:
        whole = [kind for _ in range(-(-setting.kills // len(kinds))) for kind in draws.sample(kinds, len(kinds))]
        return whole[: setting.kills]

    return [Kill(*kinds) for kinds in zip(columns(MOMENTS), columns(WHOM), columns(setting.launchers), strict=True)]


def _kill(setting: Setting, job: Job, session: Session, kill: Kill, draws: random.Random, latest: int) -> bool:
    """Wait for the moment, or for the step ``latest``, and kill; False if the run ended first."""
    try:
        there = _await(setting.server, job, session, kill.moment, draws, latest)
        if not session.running:
            if 0 in session.codes:
                return False
            raise RuntimeError(f"session {session.number} has failed by itself:\n{session.printed[-3000:]}")
        ranks = session.ranks()
        if kill.whom == "rank" and ranks:
            victims = [ranks[draws.choice(sorted(ranks))]]
        elif kill.whom == "ranks" and ranks:
            victims = session.workers()
        else:
            victims = session.processes()
        begun = session.begun()
        session.signal(signal.SIGKILL, victims)
        if kill.whom != "all" and (begun or session.launcher not in WITHOUT):
            # Before they have met, ranks without a launcher do not know of each other; srun would end them.
            kill.ended = _end_by_themselves(session)
    finally:
        setting.server.set_faults({})
        session.kill()
    kill.in_the_middle = there and _unfinished(job, session, kill.moment)
    return True


def _await(server: FaultyServer, job: Job, session: Session, moment: str, draws: random.Random, latest: int) -> bool:
    """Wait for a moment; False if it did not come before the step ``latest``."""

    def wait_for(condition: Callable[[], bool], timeout_s: float = 120.0) -> bool:
        session.wait_for(lambda: condition() or session.step() >= latest, timeout_s)
        return condition()

    if moment == "start":
        until = time.monotonic() + draws.uniform(0.0, 10.0)
        return wait_for(lambda: time.monotonic() >= until)
    if moment == "fetch":
        shutil.rmtree(job.cache, ignore_errors=True)
        wait_s = 60.0
        if draws.random() < 0.5:
            wait_for(lambda: session.steps() >= 1)
            wait_s = 3.0  # all that the next steps need may be there already
        # Part of each shard is sent, and then nothing more.
        server.set_faults({"index.json": [], "*": Fault(stall_after=2000)})
        before = len(server.requests)
        return wait_for(lambda: any(r.sent >= 2000 for r in server.requests[before:]), wait_s)
    if moment == "evaluation":
        there = wait_for(lambda: bool(session.notes("evaluates")))
        time.sleep(draws.uniform(0.0, 0.1))
        return there
    if moment == "save":
        wanted = draws.randint(1, 2)
        wait_for(lambda: session.steps() >= SAVE_EVERY * wanted - 2)
        return wait_for(lambda: any((job.run / "checkpoints").glob(".step-*.writing")), 20.0)
    wanted = draws.randint(1, 2 * SAVE_EVERY)
    there = wait_for(lambda: session.steps() >= wanted)
    time.sleep(draws.uniform(0.0, 0.2))
    return there


def _unfinished(job: Job, session: Session, moment: str) -> bool:
    """Whether what was killed has left something unfinished of the kind."""
    if moment == "save":
        return any((job.run / "checkpoints").glob(".step-*.writing"))
    if moment == "evaluation":
        ended = {(note["rank"], note["step"]) for note in session.notes("evaluated")}
        return any((note["rank"], note["step"]) not in ended for note in session.notes("evaluates"))
    return True


def _end_by_themselves(session: Session) -> bool:
    deadline = time.monotonic() + _ENDS_S
    while time.monotonic() < deadline:
        if not session.workers():
            return True
        time.sleep(0.05)
    return False
