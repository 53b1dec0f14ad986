"""A thread of each rank that says which ranks did not come when a collective takes longer than its time limit.

NCCL ends a process from a thread of its own when a collective takes too long, and gloo raises an error that names no
rank. So torch is given a longer limit (`setup.GRACE_S`), and this thread comes first. It never waits for the device,
and does nothing in the thread of the steps:

- every few seconds it writes how far its rank is (:class:`Heartbeat`) to the store of the rendezvous;
- when its rank has called no collective for a quarter of `engine.collective_timeout_s`, it reads what the others wrote,
  and again when the whole limit is over. If ranks wait for others (:func:`find_missing`), it prints one line, writes
  the stacks of all threads to the rank's log and torch's record of collectives beside it, and ends the process with
  code 1;
- when the process of a rank on its machine ends without a word, it says so at once, and ends its own;
- if nobody waits for another rank, all are computing, or the device or the network hangs. It says so once, with stacks
  in the log, and leaves the end to torch.

Decision: docs/decisions/0041-ranks-watch-each-other.md.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import pickle
import queue
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from torch.distributed.distributed_c10d import Store

from maskmatch_scale.engine.members import connect
from maskmatch_scale.engine.missing import Finding, Heartbeat, died, died_elsewhere, find_missing, is_behind, store_lost
from maskmatch_scale.engine.processes import Ends
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.errors import is_of_lost_rank
from maskmatch_scale.files import write_whole
from maskmatch_scale.timeouts import call_within

log = logging.getLogger("maskmatch_scale")

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_LONGEST_BEAT_S = 5.0
_SLOWEST_ANSWER_S = 30.0
_FIRST_LOOK = 0.25
"""Share of the time limit after which the others are looked at first. A rank that writes nothing from then on to the
end of the limit is taken for lost."""
_LOOKS = 20
"""How often in a short time limit a rank looks again while nobody waits for another."""
_BEATS_UNTIL_SILENT = 2.5
"""A rank of another machine that writes nothing for so many beats after a connection was closed has ended."""
_WRITING_S = 60.0
"""How long the log may take at the end; its disk may be what hangs."""
_NOTICED_S = 1.0
"""How soon a process is known to have ended after its connections were closed."""


class Watch:
    """Watches the other ranks of a job from a thread, if there are any; made by :func:`watch_ranks`.

    Args:
        runtime: this rank.
        timeout_s: `engine.collective_timeout_s`.
    """

    def __init__(self, runtime: Runtime, timeout_s: float) -> None:
        self.step: int | None = None
        """Number of the optimizer step that this rank is in, from 1; None: not in the loop. The loop sets it."""
        self._runtime, self._timeout_s = runtime, timeout_s
        self._beat_s = min(_LONGEST_BEAT_S, timeout_s / 10)
        self._answer_s = min(_SLOWEST_ANSWER_S, max(5.0, timeout_s / 4))
        self._watched = threading.get_ident()
        self._log: Path | None = None
        self._collectives: Path | None = None
        self._closed = threading.Event()
        self._ends: Ends | None = None
        self._gone: int | None = None
        """A rank whose process has ended, and with it the store that would say whether it had finished."""
        self._called: dict[str, int] = {}
        self._moved_at = time.monotonic()
        self._outbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        if runtime.world_size > 1:
            others = {rank: member.process for rank, member in enumerate(runtime.members) if rank != runtime.rank}
            self._ends = Ends(others)
            self._send(self._look_at_own())
            self._threads = [
                threading.Thread(target=self._run, args=(self._ends,), name="watch", daemon=True),
                threading.Thread(target=self._deliver, args=(connect(timeout_s),), name="watch-delivery", daemon=True),
            ]
            for thread in self._threads:
                thread.start()

    @contextmanager
    def logging_to(self, path: Path, collectives: Path) -> Generator[None, None, None]:
        """While the body runs, stacks go to the log of this rank, also when torch aborts the process.

        Args:
            path: the log.
            collectives: where torch's record of the last collectives is written when a rank is lost.
        """
        if not self._threads:
            yield
            return
        enabled = faulthandler.is_enabled()
        with path.open("a", encoding="utf-8") as file:
            self._log, self._collectives = path, collectives
            faulthandler.enable(file)  # NCCL's watchdog ends a process by a signal
            try:
                yield
            except RuntimeError as error:
                if is_of_lost_rank(error):
                    time.sleep(_NOTICED_S)  # the thread may see which rank it was, and end this process
                    if self._gone is not None:
                        self._end_after_death_of(self._gone)
                    self._end_after_death_elsewhere()
                raise
            finally:
                faulthandler.disable()
                if enabled:
                    faulthandler.enable()
                self._log = self._collectives = None

    def close(self, left: Literal["finished", "failed"]) -> None:
        """End the thread, and tell the other ranks."""
        if self._ends is not None:
            watching, delivering = self._threads
            # In this order: when the thread has seen that it is to close, it closes what would wake it.
            self._ends.wake()
            self._closed.set()
            watching.join(2 * self._answer_s)
            self._send(self._look_at_own(left))
            self._outbox.put(None)
            delivering.join(self._answer_s)

    def _run(self, ends: Ends) -> None:
        looked = told = False
        earlier: Sequence[Heartbeat | None] | None = None
        next_look = next_beat = 0.0
        while True:
            ended = ends.wait(max(0.0, next_beat - time.monotonic()))
            if self._closed.is_set():
                ends.close()
                return
            for rank in ended:
                self._has_ended(rank)
            if time.monotonic() < next_beat:
                continue
            next_beat = time.monotonic() + self._beat_s
            own = self._look_at_own()
            self._send(own)
            if own.still_s < self._timeout_s * _FIRST_LOOK:
                looked, told, next_look = False, False, 0.0
            elif not looked:
                looked, earlier = True, self._read()
            elif own.still_s >= self._timeout_s and time.monotonic() >= next_look:
                now = self._read()
                if now is not None:
                    now[self._runtime.rank] = own  # what was sent a moment ago may not be there yet
                finding = self._find(earlier, now)
                if finding.missing or finding.waiting:
                    self._end(finding)
                elif now is not None and is_behind(self._runtime.rank, now):
                    continue  # the others will soon have waited for the whole limit
                elif not told:
                    told = True
                    self._report(f"warning: {finding.line}", aloud=self._runtime.rank == 0)
                # Often enough that another look fits into the time that torch waits longer (`setup.GRACE_S`).
                next_look = time.monotonic() + min(self._timeout_s / _LOOKS, 2 * self._beat_s)

    def _look_at_own(self, left: Literal["finished", "failed"] | None = None) -> Heartbeat:
        called = self._runtime.collectives_called()
        if called != self._called:
            self._called, self._moved_at = called, time.monotonic()
        still_s = time.monotonic() - self._moved_at
        last = None
        if still_s >= self._timeout_s * _FIRST_LOOK:
            last = _last_collective(self._runtime.device.type)
        return Heartbeat(time.time(), called, still_s, self.step, _innermost(self._watched), last, left)

    def _send(self, own: Heartbeat) -> None:
        self._outbox.put(json.dumps(asdict(own)))

    def _deliver(self, store: Store) -> None:
        """Write what is sent to the store. A call does not return while the store's process is stopped."""
        while (text := self._outbox.get()) is not None:
            try:
                store.set(_key(self._runtime.rank), text)
            except RuntimeError:  # the store's process has ended
                return

    def _read(self) -> list[Heartbeat | None] | None:
        """What each rank last wrote; None if the store does not answer."""
        keys = [_key(rank) for rank in range(self._runtime.world_size)]

        def read() -> list[Heartbeat | None]:
            store = connect(self._answer_s)
            if store.check(keys):
                texts = list(store.multi_get(keys))
            else:  # a rank ended before its thread began
                texts = [store.get(key) if store.check([key]) else b"null" for key in keys]
            found = [json.loads(text) for text in texts]
            return [Heartbeat(**values) if values is not None else None for values in found]

        try:
            return call_within(read, self._answer_s, name="watch-store")
        except (RuntimeError, TimeoutError):
            return None

    def _find(self, earlier: Sequence[Heartbeat | None] | None, now: Sequence[Heartbeat | None] | None) -> Finding:
        members = self._runtime.members
        states = [member.process.state for member in members]
        if now is None:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return store_lost(members[0], states[0], self._timeout_s, address)
        return find_missing(members, states, earlier or [None] * len(members), now, self._timeout_s)

    def _has_ended(self, rank: int) -> None:
        """The process of a rank on this machine has ended. If it has not said so itself, print it and end this one."""
        beats = self._read()
        if beats is None:
            # The store has ended with rank 0, which may have finished, or have found what this rank will find too.
            self._gone = rank
            return
        beat = beats[rank]
        if beat is None or beat.left is None:
            self._end_after_death_of(rank)

    def _end_after_death_of(self, rank: int) -> None:
        members = self._runtime.members
        near = [r for r, member in enumerate(members) if member.process.state == "running"]
        self._report(f"error: {died(rank, members[rank])}", aloud=self._runtime.rank == min(near, default=None))
        self._closed.wait(4 * self._beat_s)
        os._exit(1)

    def _end_after_death_elsewhere(self) -> None:
        """A connection was closed. If ranks of other machines have ended without a word, print it and end this one."""
        members = self._runtime.members
        if all(member.process.is_near for member in members):
            return
        earlier = self._read()
        if earlier is not None and any(beat is not None and beat.left == "failed" for beat in earlier):
            return  # its own message says why
        time.sleep(_BEATS_UNTIL_SILENT * self._beat_s)
        now = self._read()
        line = died_elsewhere(members, earlier, now)
        if line is not None:
            self._report(f"error: {line}", aloud=self._runtime.place.local_rank == 0)
            os._exit(1)

    def _end(self, finding: Finding) -> None:
        rank = self._runtime.rank
        waits = rank in finding.waiting
        # One rank is enough to print it. If the store is lost, no rank knows whether another does.
        self._report(f"error: {finding.line}", aloud=rank == finding.waiting[0] if finding.waiting else True)
        # A rank that did not come needs time to find that out and to write its stacks: a launcher ends it when another
        # rank has ended.
        time.sleep((4 if waits else 8) * self._beat_s)
        os._exit(1)

    def _report(self, line: str, *, aloud: bool) -> None:
        rank, path, collectives = self._runtime.rank, self._log, self._collectives
        if line.startswith("error"):
            # Logging may hang too: in a lock of the thread that is watched, or on a disk.
            threading.Thread(target=_exit_after, args=(_WRITING_S,), daemon=True).start()
        if aloud:
            # Not sys.stderr, whose lock the thread that is watched may hold.
            os.write(2, f"maskmatch: {line.replace(': ', f': rank {rank}: ', 1)}\n".encode())
        log.error(line)
        try:
            if path is None:
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                return
            with path.open("a", encoding="utf-8") as file:
                file.write("the stacks of this rank's threads, innermost call first\n")
                file.flush()
                faulthandler.dump_traceback(file)
            record = _collectives(self._runtime.device.type)
            if collectives is not None and record is not None:
                write_whole(collectives, record)
        except OSError as error:
            log.error("stacks cannot be written: %s", error)


@contextmanager
def watch_ranks(runtime: Runtime, timeout_s: float) -> Generator[Watch, None, None]:
    """Watch the other ranks while the body runs.

    Args:
        runtime: this rank.
        timeout_s: `engine.collective_timeout_s`.
    """
    watch = Watch(runtime, timeout_s)
    left: Literal["finished", "failed"] = "failed"
    try:
        yield watch
        left = "finished"
    finally:
        watch.close(left)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _innermost(thread: int) -> str:
    """The two innermost functions of this package that a thread is in: `training.step.take_step:81 > …`."""
    frame = sys._current_frames().get(thread)
    found: list[str] = []
    while frame is not None and len(found) < 2:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE):
            module = path.removeprefix(_PACKAGE).removesuffix(".py").replace(os.sep, ".")
            found.insert(0, f"{module}.{frame.f_code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return " > ".join(found) or "code of others"


def _last_collective(device: str) -> str | None:
    """The last collective that this rank called: its name, and the sizes of an all-reduce; None: not known."""
    record = _collectives(device, includeStackTraces=False)
    for entry in reversed([] if record is None else pickle.loads(record)["entries"]):
        name = str(entry["profiling_name"]).rpartition(":")[2]
        if not entry["is_p2p"] and "send" not in name and "recv" not in name:
            return f"{name} {entry['input_sizes']}" if "all_reduce" in name else name
    return None


def _collectives(device: str, **options: bool) -> bytes | None:
    """What torch's flight recorder has kept of this rank's last collectives, pickled as NCCL's watchdog writes it."""
    # torch has no public name for it, and older versions have none for gloo's.
    name = "_dump_nccl_trace" if device == "cuda" else "_dump_fr_trace"
    dump = getattr(getattr(sys.modules.get("torch._C"), "_distributed_c10d", None), name, None)
    try:
        return None if dump is None else bytes(dump(**options))
    except (RuntimeError, TypeError):
        return None


def _exit_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(1)
