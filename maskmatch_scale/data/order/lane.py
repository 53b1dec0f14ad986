"""A lane of a source without an index: its shards are read in sequence, and their samples shuffled in windows.

In every epoch the shards of the source are shuffled, and each lane is dealt its share of them. A lane goes through its
epochs by itself. It reads a *window* of samples and gives them out in an order that is drawn for this window, while it
reads the next one. The first windows of a run are small. Bad samples have their places in the windows too.

So where a lane is, is told by five numbers: where its window begins (epoch, shard, sample), which window it is, and how
many samples of it were given out. To continue there, the window is read again, from the beginning of the shard in which
it begins.

Decision: docs/decisions/0066-sequential-sources.md.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample, NotFetched
from maskmatch_scale.data.order.epoch import permutation
from maskmatch_scale.data.order.patience import Patience
from maskmatch_scale.data.shards.reading import RawSample
from maskmatch_scale.data.shards.sequence import Found
from maskmatch_scale.seeds import derive_seed

_MOST_DOUBTFUL = 48
"""After so many shards in a row that could not be fetched they count as lost, however much patience is left."""


_READ_AT_ONCE = 16
"""Samples that are read ahead when as many were given. Between two samples an image is decoded, and the processor's
caches have nothing left of what reads: each one alone takes three times as long."""
_MOST_DOUBLED = 40
"""Windows are as large as they become long before this one."""
FIRST_WINDOW = 64
"""Samples of the first window of a lane, for which a new run waits."""


class Cursor(NamedTuple):
    """A place in the shards of a lane."""

    epoch: int = 0
    shard: int = 0
    """Number among the shards that the lane has in this epoch."""
    sample: int = 0
    """Number in the shard, also counting bad ones and those that are not wanted."""


class LaneState(NamedTuple):
    """Where a lane is."""

    start: Cursor = Cursor()
    """Of its window."""
    window: int = 0
    """Number of the window."""
    given: int = 0
    """Samples of the window that were given out, bad ones included."""

    def as_json(self) -> list[int]:
        """What :meth:`from_json` reads: five numbers."""
        return [*self.start, self.window, self.given]

    @classmethod
    def from_json(cls, values: list[int]) -> LaneState:
        """Read what :meth:`as_json` returned.

        Raises:
            TypeError: it is something else.
            ValueError: likewise.
        """
        epoch, shard, sample, window, given = map(int, values)
        return cls(Cursor(epoch, shard, sample), window, given)


class Entry(NamedTuple):
    """A sample of a lane, or what stands for one that cannot be used."""

    at: Cursor
    shard: int
    """Number in the list of the source."""
    found: Found


class Windows(NamedTuple):
    """How large the windows of a lane are: whichever is reached first."""

    samples: int
    bytes: int
    """Of encoded images."""
    first: int = FIRST_WINDOW
    """Samples of the first window. Each one has twice as many as the one before, until `samples` are reached."""

    def size(self, number: int) -> int:
        """Most samples of window ``number``."""
        return min(self.samples, self.first << min(number, _MOST_DOUBLED))


class OutOfReachError(Exception):
    """A lane cannot go on: the network is taken for lost.

    Args:
        shard: number in the list of the source.
        cause: why the shard cannot be fetched.
    """

    def __init__(self, shard: int, cause: NotFetched) -> None:
        super().__init__(str(cause))
        self.shard, self.cause = shard, cause


class Lane:
    """The samples of one lane, without end.

    Args:
        seed: of the source: the order of its shards is drawn from it.
        shards: number of shards of the source.
        lane: which one.
        lanes: how many there are.
        windows: how large they are.
        read: reads the shard of this number in the list of the source.
        patience: how long may be waited for shards that do not come.
        skip: whether a shard that cannot be fetched is passed over. If not, the network is taken for lost.
        state: where it goes on.
    """

    def __init__(
        self,
        seed: int,
        shards: int,
        lane: int,
        lanes: int,
        windows: Windows,
        read: Callable[[int], Generator[Found, None, None]],
        patience: Patience,
        *,
        skip: bool = True,
        state: LaneState = LaneState(),  # noqa: B008 - it cannot be changed
    ) -> None:
        assert lanes <= shards
        self._seed, self._shards, self._lane, self._lanes, self._windows = seed, shards, lane, lanes, windows
        self._read_shard, self._patience, self._skip = read, patience, skip
        # Of the window that is given out; an entry is dropped when it is.
        self._state = state
        self._window: list[Entry | None] | None = None
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        # Of the next one.
        self._ahead: list[Entry] = []
        self._ahead_bytes = 0
        # Of reading.
        self._cursor = state.start
        self._share: tuple[int, NDArray[np.int64]] | None = None
        self._reader: Generator[Found, None, None] | None = None
        self._to_skip = 0
        self._ready: deque[Entry] = deque()
        self._doubtful: list[Entry] = []
        self.left_out = 0
        """Samples that were read and not wanted, since this object was made."""
        self.left_out_in_a_row = self.shards_in_a_row = 0
        """Likewise since the last one that was wanted; and how many shards were read to their ends meanwhile."""

    @property
    def state(self) -> LaneState:
        """Where it is. A lane that is made with it goes on with the same samples."""
        if self._window is None or self._state.given < len(self._window):
            return self._state
        first = self._ahead or self._ready or self._doubtful
        return LaneState(first[0].at if first else self._cursor, self._state.window + 1, 0)

    def take(self) -> Entry:
        """The next sample.

        Raises:
            OutOfReachError: there is none on this machine, and the network is taken for lost. The lane stays where it
                is, and may be asked again.
            DataError: a library is missing, or the like.
        """
        while self._window is None or self._state.given >= len(self._window):
            self._next_window()
        number = int(self._order[self._state.given])
        entry, self._window[number] = self._window[number], None
        assert entry is not None
        self._state = self._state._replace(given=self._state.given + 1)
        if self._state.given % _READ_AT_ONCE == 0:
            number, windows = self._state.window, self._windows
            grows = windows.size(number + 1) > windows.size(number)
            with suppress(OutOfReachError):  # there are others to be given out before
                for _ in range(2 * _READ_AT_ONCE if grows else _READ_AT_ONCE):
                    self._read_ahead()
        return entry

    def close(self) -> None:
        """Read no further."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _next_window(self) -> None:
        while self._read_ahead():
            pass
        if self._window is not None:
            self._state = self.state
        self._window = list(self._ahead)
        self._order = permutation(derive_seed(self._seed, "window", self._lane, self._state.window), len(self._window))
        for number in self._order[: self._state.given].tolist():  # given out before the run continued
            self._window[number] = None
        self._ahead, self._ahead_bytes = [], 0

    def _read_ahead(self) -> bool:
        """Read one more sample of the next window; returns whether there was room."""
        following = self._state.window + (self._window is not None)
        if len(self._ahead) >= self._windows.size(following) or self._ahead_bytes >= self._windows.bytes:
            return False
        while not self._ready:
            self._read()
        entry = self._ready.popleft()
        self._ahead.append(entry)
        if isinstance(entry.found.sample, RawSample):
            self._ahead_bytes += len(entry.found.sample.image)
        return True

    def _read(self) -> None:
        """Go on in the shards by one sample, or to the next shard.

        Shards in a row that cannot be fetched are doubtful: they are lost if one comes after them. If none comes until
        the patience is at its end, the lane goes back to the first of them.
        """
        shard = self._shard()
        if self._reader is None:
            self._reader, self._to_skip = self._read_shard(shard), self._cursor.sample
        began = time.monotonic()
        try:
            found = next(self._reader, None)
        except NotFetched as error:
            self._reader = None
            self._patience.waited(time.monotonic() - began)
            if error.may_pass and (self._patience.is_lost or not self._skip):
                self._patience.give_up()
                self._cursor = self._doubtful[0].at if self._doubtful else self._cursor
                self._doubtful.clear()
                raise OutOfReachError(shard, error) from None
            entry = Entry(self._cursor, shard, Found(None, error))
            if error.may_pass and len(self._doubtful) < _MOST_DOUBTFUL:
                self._doubtful.append(entry)
            else:  # the server has said that there is no such file, or it has been long enough
                self._come(entry)
            self._next_shard()
            return
        except BadSample as error:
            self._come(Entry(self._cursor, shard, Found(None, error)))
            self._next_shard()
            return
        if found is None:
            self.shards_in_a_row += 1
            self._next_shard()
        elif self._to_skip:
            self._to_skip -= 1
        else:
            self._come(Entry(self._cursor, shard, found))
            self._cursor = self._cursor._replace(sample=self._cursor.sample + 1)

    def _come(self, entry: Entry) -> None:
        self._ready.extend(self._doubtful)
        self._doubtful.clear()
        if entry.found.sample is None:
            self.left_out += 1
            self.left_out_in_a_row += 1
            return
        self._ready.append(entry)
        if isinstance(entry.found.sample, RawSample):
            self.left_out_in_a_row = self.shards_in_a_row = 0

    def _shard(self) -> int:
        """Number of the shard at the cursor in the list of the source."""
        epoch = self._cursor.epoch
        if self._share is None or self._share[0] != epoch:
            order = permutation(derive_seed(self._seed, "shards", epoch), self._shards)
            self._share = epoch, order[self._lane :: self._lanes].copy()
        return int(self._share[1][self._cursor.shard])

    def _next_shard(self) -> None:
        assert self._share is not None
        self.close()
        epoch, shard, _ = self._cursor
        last = shard + 1 == len(self._share[1])
        self._cursor = Cursor(epoch + 1) if last else Cursor(epoch, shard + 1)
