"""How all ranks stop after the same step, although only one of them may want to.

A rank may want to stop at any moment: it got a signal, its time is up, a callback has seen enough. After every step the
ranks exchange one number each, and read what came of it two steps later: by then the device has long passed it, so that
no rank waits. All ranks read the same number at the same step, so all of them stop there. In an evaluation, where the
ranks exchange numbers for every image anyway, they need not wait for the end (`evaluation/evaluate.py`).

Decision: docs/decisions/0046-ranks-agree-to-stop.md.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.errors import RESUMABLE

READ_AFTER = 2
"""Steps between an exchange and its reading. The host is rarely more than one step ahead of the device."""

_CODE, _FAILURE = 1 << 32, 1 << 40


@dataclass(frozen=True)
class Stop:
    """Why a run has to stop."""

    reason: str
    """One line, which may name a signal, a key or a file."""
    exit_code: int
    """1 to 255, of the command. Anything but `RESUMABLE` outranks it: starting such a run again would not help."""


class Agreement:
    """The wishes of this rank and the decision of all of them.

    Args:
        runtime: this rank.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._wish: Stop | None = None
        self._decided: Stop | None = None
        self._asking = threading.Lock()
        self._exchanges: deque[tuple[Callable[[], int], Stop | None]] = deque()

    def ask(self, wish: Stop) -> None:
        """Want to stop, on this rank; any thread may call it, on any rank. The first wish of a kind counts."""
        with self._asking:
            if self._wish is None or _weight(wish) > _weight(self._wish):
                self._wish = wish

    @property
    def wanted(self) -> bool:
        """Whether this rank wants to stop. The others may not know yet."""
        return self._wish is not None

    @property
    def decided(self) -> Stop | None:
        """What all ranks know and act on; None: go on."""
        return self._wish if self._runtime.world_size == 1 else self._decided

    def exchange(self) -> None:
        """Send this rank's wish, and read what was sent two steps ago; all ranks call it together after a step."""
        if self._runtime.world_size > 1 and self._decided is None:
            self._start()
            if len(self._exchanges) > READ_AFTER:
                self._read()

    def settle(self) -> None:
        """Send this rank's wish, and wait for those of all ranks; all ranks call it together."""
        if self._runtime.world_size > 1 and self._decided is None:
            self._start()
            while self._exchanges:
                self._read()

    def _start(self) -> None:
        wish = self._wish
        value = 0 if wish is None else _weight(wish) + self._runtime.world_size - self._runtime.rank
        self._exchanges.append((self._runtime.max_over_ranks(value), wish))

    def _read(self) -> None:
        read, wish = self._exchanges.popleft()
        value = read()
        if value and self._decided is None:
            rank = self._runtime.world_size - value % _CODE
            reason = self._runtime.text_of(rank, wish.reason if wish is not None else "")
            self._decided = Stop(f"rank {rank}: {reason}", value % _FAILURE // _CODE)


def _weight(wish: Stop) -> int:
    """The larger, the more it counts; a multiple of 2³², below which there is room for a rank."""
    return wish.exit_code * _CODE + (_FAILURE if wish.exit_code != RESUMABLE else 0)
