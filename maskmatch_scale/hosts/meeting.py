"""The ranks of several hosts meet when each has passed its own checks, before they join a process group.

They meet at the store of the rendezvous. NCCL of two versions, for example, ends or hangs in its first collective, so
hosts are compared before there is one. One rank of each host reports, rank 0 judges, and all read the verdict. A rank
whose own checks have failed says so: the others would wait for it.

Decision: docs/decisions/0078-hosts-compared-before-they-join.md.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.members import connect
from maskmatch_scale.engine.setup import announce
from maskmatch_scale.errors import CommandFailed, UserError
from maskmatch_scale.redact import redacted

_TELLING_S = 30.0
"""How long a rank whose checks have failed tries to tell the others: rank 0 may still be at its own checks, or be on a
host that never comes."""
_LEAVING_S = 10.0
"""How long ranks of rank 0's host wait for the others to read why the job ends: its process holds what they read, and
its launcher ends it when another of them has ended."""
_LOOK_S = 1.0
"""How often a rank looks for the verdict at least."""
_MEETINGS = itertools.count()
"""Of this process: all ranks of a job have had as many."""


@dataclass(frozen=True)
class Verdict:
    """What rank 0 makes of the reports."""

    refusal: str = ""
    """Why no run starts, in one line; empty: it starts."""
    notes: tuple[str, ...] = ()
    """Lines on what is only odd."""
    exit_code: int = 2
    """Of the command if it is refused: 2, a user's mistake, or 1."""


def has_several_hosts(place: Place) -> bool:
    """Whether the job runs on several hosts, by its launcher's variables."""
    return place.world_size > place.local_world_size


@contextmanager
def telling_others(place: Place) -> Generator[None, None, None]:
    """Tell the ranks of other hosts if the body fails, so that they end too. On one host the launcher ends them.

    Args:
        place: of this rank.
    """
    try:
        yield
    except Exception as error:
        if has_several_hosts(place):
            with suppress(RuntimeError, TimeoutError, UserError):  # nobody is there to be told
                _tell(place, error)
        raise


def meet(
    place: Place,
    timeout_s: float,
    report: Callable[[str], str],
    prepared: AbstractContextManager[str],
    judge: Callable[[Sequence[str]], Verdict],
) -> tuple[str, ...]:
    """Meet the other ranks; all ranks call it together once each has passed its own checks.

    Args:
        place: of this rank.
        timeout_s: how long the others may take to come.
        report: makes the report of this rank's host, on its first rank, from what ``prepared`` gave.
        prepared: entered on rank 0 while the hosts make their reports; gives a text that all hosts get.
        judge: makes the verdict on rank 0, from the reports of all hosts.

    Returns:
        On rank 0 the lines on what is odd; elsewhere none.

    Raises:
        UserError: on every rank: the hosts do not fit together, or a rank's checks have failed by a user's mistake.
        CommandFailed: on every rank: a rank's checks have failed otherwise. Or the others have not come.
    """
    try:
        store = _open(place, timeout_s)
        if place.rank == 0:
            with prepared as word:
                called = _call(store, word)
                _report(store, called, place, report, word)
                verdict = _judged(store, called, place, timeout_s, judge)
            called.set("verdict", json.dumps(asdict(verdict)))
        else:
            verdict = _answered(store, place, timeout_s, report)
    except (DistError, TimeoutError) as error:  # of the store
        if place.rank == 0:
            raise
        raise CommandFailed(
            f"rank 0, at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, does not answer, or has not passed "
            f"its checks within {timeout_s:g} s; its output says why ({str(error).splitlines()[0]})"
        ) from error
    if verdict.refusal:
        _leave(store, place)
        refused = (UserError if verdict.exit_code == 2 else CommandFailed)(verdict.refusal)
        refused.on_all_ranks = True
        raise refused
    return tuple(verdict.notes) if place.rank == 0 else ()


def _open(place: Place, timeout_s: float) -> Store:
    """The store of the rendezvous, which torch will use too. On rank 0 it is served from now on."""
    announce(place)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # torch's own, made later, is then served by this one.
        _SERVED.append(TCPStore(address, port, is_master=True, wait_for_workers=False, multi_tenant=True))
    return PrefixStore(f"hosts/{next(_MEETINGS)}", connect(timeout_s))


_SERVED: list[TCPStore] = []
"""Kept for the life of the process: a store ends with its object."""


def _call(store: Store, word: str) -> Store:
    """Call the others, on rank 0; returns the part of the store for what they answer to this call.

    Under torchrun with an elastic number of hosts the store outlives the ranks, and has what those of an earlier round
    wrote. So each call has a name of its own.
    """
    name = secrets.token_hex(6)
    called = PrefixStore(name, store)
    called.set("word", word)
    store.set("call", name)
    return called


def _answered(store: Store, place: Place, timeout_s: float, report: Callable[[str], str]) -> Verdict:
    """Answer the call of rank 0, and wait for its verdict. A call may turn out to be one of an earlier round."""
    until, pause, answered = time.monotonic() + timeout_s, 0.01, ""
    while time.monotonic() < until:
        # Looked at again and again: a signal is not heard in a call that waits.
        if store.check(["call"]):
            name = store.get("call").decode()
            called = PrefixStore(name, store)
            verdict = _read(called) if called.check(["verdict"]) else None
            if verdict is not None and (verdict.refusal or name == answered):
                return verdict
            if verdict is None and name != answered:  # a verdict that did not wait for this rank is an old one
                _report(store, called, place, report, called.get("word").decode())
                answered, pause = name, 0.01
        time.sleep(pause)
        pause = min(2 * pause, _LOOK_S)
    raise TimeoutError("no verdict")


def _read(called: Store) -> Verdict:
    return Verdict(**json.loads(called.get("verdict")))


def _report(store: Store, called: Store, place: Place, report: Callable[[str], str], word: str) -> None:
    if place.local_rank == 0:
        try:
            text = report(word)
        except Exception as error:
            _refuse(store, called, place, error)
            raise
        called.set(f"report/{called.add('reports', 1)}", text)
    called.add("passed", 1)


def _judged(
    store: Store, called: Store, place: Place, timeout_s: float, judge: Callable[[Sequence[str]], Verdict]
) -> Verdict:
    """Wait until all ranks have passed their checks or one has failed, and judge."""
    until, pause = time.monotonic() + timeout_s, 0.01
    while not store.check(["refused"]):
        passed = called.add("passed", 0)
        if passed == place.world_size:
            return judge([text.decode() for text in _reports(called)])
        if time.monotonic() > until:
            hosts = ", ".join(sorted(json.loads(text)["label"] for text in _reports(called)))
            return Verdict(
                f"only {passed} of {place.world_size} ranks have come within {timeout_s:g} s, those of {hosts}; look "
                "at the output of the others' launchers",
                exit_code=1,
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return Verdict(**json.loads(store.get("refused")))


def _reports(called: Store) -> list[bytes]:
    return list(called.multi_get([f"report/{number + 1}" for number in range(called.add("reports", 0))]))


def _tell(place: Place, error: Exception) -> None:
    store = _open(place, _TELLING_S)
    _refuse(store, _call(store, "") if place.rank == 0 else store, place, error)


def _refuse(store: Store, called: Store, place: Place, error: Exception) -> None:
    """Let all ranks end because this one has failed."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    line = f"rank {place.rank} on {socket.gethostname()} has failed its checks: {redacted(text)}"
    verdict = json.dumps(asdict(Verdict(line, exit_code=2 if isinstance(error, UserError) else 1)))
    store.set("refused", verdict)
    if place.rank == 0:
        called.set("verdict", verdict)
    _leave(store, place)


def _leave(store: Store, place: Place) -> None:
    """Count this rank as one that knows; those of rank 0's host wait for the others a little."""
    with suppress(RuntimeError):  # rank 0 has gone
        store.add("read", 1)
        until = time.monotonic() + _LEAVING_S
        beside_rank_0 = place.rank == place.local_rank
        while beside_rank_0 and store.add("read", 0) < place.world_size and time.monotonic() < until:
            time.sleep(0.05)
