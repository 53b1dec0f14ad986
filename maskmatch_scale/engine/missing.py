"""Which ranks the others wait for, told from what every rank last wrote about itself.

All ranks call the same collectives in the same order, so the one that has called fewer is the one that did not come.
Without collectives a rank may compute as long as it likes: the others wait for it only once they have called one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from maskmatch_scale.engine.members import Member
from maskmatch_scale.engine.processes import State

_NAMED = 8
"""Ranks that a line names one by one."""
_LEFT = {"finished": "has finished its run", "failed": "has ended its run with an error"}


@dataclass(frozen=True)
class Heartbeat:
    """What a rank writes about itself every few seconds."""

    at: float
    """When it was written: seconds since 1970, by the clock of the rank's host."""
    collectives: Mapping[str, int]
    """How many collectives the rank has called, by the name of the process group; groups of all ranks alone."""
    still_s: float
    """Seconds since it called the last one."""
    step: int | None
    """Number of the optimizer step that it is in, from 1; None: not in a step."""
    doing: str
    """The innermost functions of this package that its thread is in."""
    last: str | None = None
    """The last collective that it called, without what may differ between ranks; None: not known."""
    left: Literal["finished", "failed"] | None = None
    """Whether it has finished its run, or ended it with an error that it reports itself."""


@dataclass(frozen=True)
class Finding:
    """What is found when collectives have stood still for the time limit."""

    missing: tuple[int, ...]
    """Ranks that the others wait for."""
    waiting: tuple[int, ...]
    """Ranks that have waited for the whole time limit. Empty: nobody waits for another rank, as far as can be seen."""
    line: str
    """For people, without a line break."""


def find_missing(
    members: Sequence[Member],
    states: Sequence[State],
    earlier: Sequence[Heartbeat | None],
    now: Sequence[Heartbeat | None],
    timeout_s: float,
) -> Finding:
    """Find the ranks that did not come to a collective.

    Args:
        members: the ranks.
        states: of their processes.
        earlier: what each had written when this rank first looked, some time before the limit was over; None: nothing.
        now: what each has written by now.
        timeout_s: `engine.collective_timeout_s`.
    """
    ranks = range(len(members))
    silent = {r for r in ranks if _silent(states[r], earlier[r], now[r])}
    waiting = tuple(
        r
        for r in ranks
        if r not in silent
        and (own := now[r]) is not None
        and own.still_s >= timeout_s
        and (silent or any(_ahead(own, now[other]) for other in ranks))
    )
    if not waiting:
        waiting = _out_of_step(now, timeout_s)
        if waiting:
            return _waiting_for_each_other(waiting, members, states, now, timeout_s)
        where = "; ".join(_named(r, members[r], states[r], now[r]) for r in ranks[:_NAMED])
        return Finding(
            (), (), f"no collective for {timeout_s:g} s, and no rank waits for another, as far as can be seen: {where}"
        )
    late = {
        r
        for r in ranks
        if any(_ahead(now[w], now[r]) for w in waiting)
        and not any(_ahead(now[r], now[other]) for other in ranks if other not in silent)
    }
    missing = tuple(sorted(silent | late))
    if not missing:
        return _waiting_for_each_other(waiting, members, states, now, timeout_s)
    limit = f"(engine.collective_timeout_s={timeout_s:g})"
    lost = _lost_hosts(members, states, silent)
    named = [r for r in missing if lost.get(members[r].host, r) == r][:_NAMED]
    names = "; ".join(_named(r, members[r], states[r], now[r]) for r in named)
    more = f"; and {len(missing) - len(named)} more" if len(missing) > len(named) else ""
    first = now[waiting[0]]
    assert first is not None
    remedies = "; ".join(
        dict.fromkeys(
            _host_remedy(list(lost)) if members[r].host in lost else _remedy(states[r], silent=r in silent)
            for r in missing
        )
    )
    who, them = ("another rank", "it") if len(missing) == 1 else ("other ranks", "them")
    return Finding(
        missing,
        waiting,
        f"{who} did not join a collective within the time limit {limit}: {names}{more}; rank {waiting[0]} waits for "
        f"{them} {_place(first)}; {remedies}",
    )


def is_behind(rank: int, now: Sequence[Heartbeat | None]) -> bool:
    """Whether another rank has called a collective that this one has not."""
    return any(_ahead(other, now[rank]) for other in now)


def store_lost(member: Member, state: State, timeout_s: float, address: str) -> Finding:
    """The finding if rank 0, at whose address the ranks write, does not answer any more."""
    return Finding(
        (0,),
        (),
        f"no collective within the time limit (engine.collective_timeout_s={timeout_s:g}), and nothing answers at "
        f"{address}, the address of rank 0 ({_identity(member, state)}); {_remedy(state, silent=True)}",
    )


def died(rank: int, member: Member) -> str:
    """What to say of a rank whose process has ended without a word from itself."""
    return f"another rank has died: rank {rank} ({_identity(member, 'ended')}); {_remedy('ended', silent=True)}"


def died_elsewhere(
    members: Sequence[Member], earlier: Sequence[Heartbeat | None] | None, now: Sequence[Heartbeat | None] | None
) -> str | None:
    """What to say if a connection was closed and ranks of other machines write nothing any more; None: all write.

    Args:
        members: the ranks.
        earlier: what each had written soon after the connection was closed; None: rank 0's address does not answer.
        now: what each has written since, so much later that a rank that lives has written again.
    """
    if earlier is None or now is None:
        silent = [0]
    else:
        silent = [r for r in range(len(members)) if _silent("unknown", earlier[r], now[r])]
    silent = [r for r in silent if not members[r].process.is_near]
    if not silent:
        return None
    names = "; ".join(f"rank {r} ({_identity(members[r], 'unknown')})" for r in silent[:_NAMED])
    more = f"; and {len(silent) - _NAMED} more" if len(silent) > _NAMED else ""
    who = "another rank has" if len(silent) == 1 else "other ranks have"
    remedy = _remedy("ended", silent=True)
    return f"{who} died: {names}{more}; a connection was closed, and nothing was heard since; {remedy}"


def _out_of_step(now: Sequence[Heartbeat | None], timeout_s: float) -> tuple[int, ...]:
    """Two ranks that have called equally many collectives, but not the same ones; empty: there are none."""
    still = [(r, beat) for r, beat in enumerate(now) if beat is not None and beat.still_s >= timeout_s and beat.last]
    for r, beat in still[1:]:
        if beat.last != still[0][1].last:
            return (still[0][0], r)
    return ()


def _waiting_for_each_other(
    waiting: tuple[int, ...],
    members: Sequence[Member],
    states: Sequence[State],
    now: Sequence[Heartbeat | None],
    timeout_s: float,
) -> Finding:
    places = "; ".join(_named(r, members[r], states[r], now[r]) for r in waiting[:_NAMED])
    return Finding(
        (),
        waiting,
        f"ranks wait for each other in different collectives, so none did join a collective within the time limit "
        f"(engine.collective_timeout_s={timeout_s:g}): {places}; they ran different code, for example another number "
        "of forwards",
    )


def _silent(state: State, earlier: Heartbeat | None, now: Heartbeat | None) -> bool:
    if now is not None and now.left == "finished":
        return False
    return state in ("ended", "stopped") or now is None or (earlier is not None and earlier.at == now.at)


def _ahead(one: Heartbeat | None, other: Heartbeat | None) -> bool:
    """Whether ``one`` has called a collective that ``other`` has not."""
    if one is None:
        return False
    called = {} if other is None else other.collectives
    return any(count > called.get(group, 0) for group, count in one.collectives.items())


def _lost_hosts(members: Sequence[Member], states: Sequence[State], silent: set[int]) -> dict[str, int]:
    """Other machines of which no rank writes any more, and the first rank of each."""
    first: dict[str, int] = {}
    for rank, member in enumerate(members):
        first.setdefault(member.host, rank)
    for rank, member in enumerate(members):
        if rank not in silent or states[rank] != "unknown":
            first.pop(member.host, None)
    return first


def _host_remedy(hosts: Sequence[str]) -> str:
    names = ", ".join(hosts[:_NAMED]) + (f" and {len(hosts) - _NAMED} more" if len(hosts) > _NAMED else "")
    which, it = (f"host {names}", "it") if len(hosts) == 1 else (f"hosts {names}", "each of them")
    return (
        f"no rank of {which} is heard of: {it} is down or cut off from the network, or its processes hang: look there"
    )


def _named(rank: int, member: Member, state: State, beat: Heartbeat | None) -> str:
    if beat is None:
        return f"rank {rank} ({_identity(member, state)}), which has written nothing"
    heard = time.strftime("%H:%M:%S", time.localtime(beat.at))
    place = _LEFT[beat.left] if beat.left else f"is {_place(beat)}"
    return f"rank {rank} ({_identity(member, state)}) {place}, last heard of at {heard}"


def _identity(member: Member, state: State) -> str:
    shown = "" if state in ("running", "unknown") else f", {state}"
    return f"host {member.host}, process {member.process.number}{shown}"


def _place(beat: Heartbeat) -> str:
    step = "" if beat.step is None else f"at step {beat.step}, "
    last = "" if beat.last is None else f" (last collective: {beat.last})"
    return f"{step}in {beat.doing}{last}, for {beat.still_s:.0f} s"


def _remedy(state: State, *, silent: bool) -> str:
    if state == "ended":
        return "its own message, its log and the kernel's (out of memory?) say why it ended"
    if state == "stopped":
        return "something has stopped its process (SIGSTOP, a debugger, the scheduler): let it go on, or end it"
    if silent:
        return "its process hangs, or its machine or the network is down: look there"
    return (
        "its log, log/rank-N.txt in the run directory, shows where it is; if it only needs longer, raise "
        "engine.collective_timeout_s"
    )
