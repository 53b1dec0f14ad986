"""Images that could not be predicted: said, listed, and told by the exit code, of one rank or of several.

Launchers end all ranks as soon as one ends with an error. So a rank whose images failed does not say so by its exit
code, but the last rank that finishes does, for all: each leaves a file when it has finished, and the last one finds
those of all others.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.files import append_lines

_ALONE = "failed.jsonl"
_OF_RANK = re.compile(r"failed-rank-(\d+)\.jsonl")


def say(line: str) -> None:
    """Print a line on stderr."""
    with suppress(OSError):  # a terminal that was closed
        sys.stderr.write(f"maskmatch: {line}\n")
        sys.stderr.flush()


class Failures:
    """The failures of one rank.

    Args:
        out: folder of the predictions.
        place: of this rank.
    """

    def __init__(self, out: Path, place: Place) -> None:
        self._out, self._place = out, place
        self.path = self._list_of(place.rank)
        """Its list; it exists if there are any."""
        self.count = 0
        """How many there are."""

    def _list_of(self, rank: int) -> Path:
        return self._out / (_ALONE if self._place.world_size == 1 else f"failed-rank-{rank}.jsonl")

    def _finished(self, rank: int) -> Path:
        return self._out / f".finished-rank-{rank}-of-{self._place.world_size}"

    def begin(self) -> None:
        """Say that this rank is at work; called before anything takes long, so that no other one takes it for done."""
        with suppress(NotADirectoryError):  # which is refused later
            self._finished(self._place.rank).unlink(missing_ok=True)

    def forget_earlier(self) -> None:
        """Remove the lists of an earlier start: what failed is tried again. Called when the folder is known as ours."""
        self.path.unlink(missing_ok=True)
        if self._place.rank == 0:
            for path in self._out.glob("failed*.jsonl"):
                match = _OF_RANK.fullmatch(path.name)
                if match is not None:
                    old = self._place.world_size == 1 or int(match[1]) >= self._place.world_size
                else:
                    old = path.name == _ALONE
                if old:
                    path.unlink(missing_ok=True)

    def add(self, where: str, fault: DataError) -> None:
        """One more: a line on stderr, and one in the list."""
        self.count += 1
        reason = " ".join(str(fault).split())
        say(f"skipped: {reason}")
        append_lines(self.path, [json.dumps({"image": where, "reason": reason})])  # ASCII: names may be no UTF-8

    def say_by_exit_code(self) -> bool:
        """Whether this process has to end with an error: some image failed, and no other rank is at work any more."""
        ranks = range(self._place.world_size)
        if len(ranks) == 1:
            return self.count > 0
        self._finished(self._place.rank).touch()
        if not all(self._finished(rank).exists() for rank in ranks):
            return False
        for rank in ranks:
            self._finished(rank).unlink(missing_ok=True)
        return any(self._list_of(rank).exists() for rank in ranks)
