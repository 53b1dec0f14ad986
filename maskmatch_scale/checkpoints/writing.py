"""Writing checkpoints in the background. The steps wait only until the state is copied to host memory.

    save      every rank copies its pieces to host memory and goes on; the rest is done by a thread of each rank:
      write     its part into `.step-X.writing`, flushed to the disk, hashed on the way
      report    to rank 0 what it has written, or why it could not
    rank 0    when all parts are there: writes state.json, stream.json, index.json; renames the folder; `latest`;
              deletes checkpoints that are not kept; tells all ranks how it ended
    wait      at the next save, and at the end of the run: all ranks learn from rank 0 how it ended

If anything fails, what was written of it is removed, and the checkpoints before it stay. The threads call no
collective, which would have to take its turn among those of the steps.

Decision: docs/decisions/0045-checkpoints-written-in-the-background.md.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from maskmatch_scale.checkpoints.index import FileEntry, Index, Span
from maskmatch_scale.checkpoints.layout import INDEX, LATEST, STATE, STREAM, folder_name, part_name, writing
from maskmatch_scale.checkpoints.parts import DTYPES, HostCopies, write_part
from maskmatch_scale.checkpoints.pieces import Piece
from maskmatch_scale.checkpoints.reading import unless_read
from maskmatch_scale.checkpoints.reports import Reports, Store
from maskmatch_scale.files import sha256, write_whole

log = logging.getLogger("maskmatch_scale")

_NUMBERS = itertools.count()
"""Of the checkpoints of this process: its runs share a store."""
_MARGIN_S = 60.0
"""By how much longer other ranks wait for rank 0 than rank 0 waits for them; and how long is waited for a message."""
_APPEARS_S = 30.0
"""How long a part that another machine has written may take to be seen here, on a network file system."""
_OUTCOME = "outcome"


@dataclass
class Outcome:
    """How the writing of a checkpoint ended."""

    step: int
    folder: Path
    copy_s: float
    """Seconds that this rank's steps waited for the copy to host memory."""
    write_s: float = 0.0
    """Seconds from then on until it was complete."""
    bytes: int = 0
    """Of the whole checkpoint."""
    error: str | None = None
    """Why it could not be written; None: it is complete."""


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; every rank has one.

    Args:
        folder: `RUN/checkpoints`.
        rank: this rank.
        world_size: number of ranks.
        store: that all ranks reach; only this object's thread uses it.
        timeout_s: how long rank 0 waits for the parts of the other ranks once its own is written.
        newest: the checkpoint that the run continues from.
        completed: called on rank 0, by the thread, with the step of a checkpoint that is complete.
        agreed: gives rank 0's text on every rank; all ranks call it together, in :meth:`wait`.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        store: Store,
        timeout_s: float,
        newest: Path | None = None,
        completed: Callable[[int], None] = lambda step: None,
        agreed: Callable[[str], str] = lambda error: error,
    ) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._store, self._timeout_s = store, timeout_s
        self._newest = newest
        self._completed, self._agreed = completed, agreed
        self._copies = HostCopies()
        self._thread: Thread | None = None
        self._outcome: Outcome | None = None

    def save(
        self,
        step: int,
        pieces: Iterable[Piece],
        state: Mapping[str, Any],
        stream: Mapping[str, Any],
        own_stream: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to write the checkpoint of a step; all ranks call it together, after :meth:`wait`.

        Args:
            step: optimizer steps taken.
            pieces: of this rank. They are copied before this returns.
            state: JSON values for `state.json`; those of rank 0 are written.
            stream: state of the training batches, likewise.
            own_stream: what this rank adds to it; `stream.json` has those of all ranks, in their order, as `ranks`.
        """
        assert self._thread is None, "the checkpoint before it was not waited for"
        began = time.monotonic()
        copies = self._copies.take(pieces)
        outcome = Outcome(step, self._folder / folder_name(step), time.monotonic() - began)
        # As text, because they may change from now on.
        texts = {STATE: json.dumps({**state, "step": step}, indent=1), STREAM: json.dumps(stream)}
        own = json.dumps(own_stream)
        reports = Reports(self._store, next(_NUMBERS))
        self._outcome = outcome
        # A disk that hangs must not keep the process from ending.
        self._thread = Thread(
            target=self._run, args=(outcome, copies, texts, own, reports), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def under_way(self) -> Outcome | None:
        """The checkpoint that :meth:`wait` has not given yet; complete or not, as :attr:`is_writing` says."""
        return self._outcome

    def wait(self) -> Outcome | None:
        """Wait for the checkpoint that is being written; all ranks call it together.

        Returns:
            How it ended, the same on every rank; None: there is none.
        """
        if self._thread is None:
            return None
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        assert outcome is not None
        # A rank that has lost the store, or has waited too long, did not hear it.
        outcome.error = self._agreed(outcome.error or "") or None
        if outcome.error is None:
            self._newest = outcome.folder
        return outcome

    def join(self, timeout_s: float) -> None:
        """Wait for the checkpoint that is being written, and leave how it ended to :meth:`wait`."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, after waiting a while for one that is being written; None: there is none."""
        self.join(_MARGIN_S)
        outcome = self._outcome
        return outcome.folder if outcome and not self.is_writing and outcome.error is None else self._newest

    def _run(
        self, outcome: Outcome, copies: Sequence[Piece], texts: Mapping[str, str], own_stream: str, reports: Reports
    ) -> None:
        began = time.monotonic()
        into = writing(outcome.folder)
        report = self._write_own(into, copies) | {"stream": json.loads(own_stream)}
        if self._rank == 0:
            try:
                reported = self._reports_of_all(report, reports)
                outcome.bytes = self._complete(outcome.folder, reported, _with_ranks(texts, reported))
            except (OSError, ValueError) as error:
                outcome.error = _reason(error)
            except Exception as error:
                log.exception("a bug in writing checkpoints")
                outcome.error = _reason(error)
            if outcome.error is not None:
                shutil.rmtree(into, ignore_errors=True)
                log.warning("step %d: the checkpoint could not be written: %s", outcome.step, outcome.error)
            outcome.write_s = time.monotonic() - began
            reports.tell(_OUTCOME, {"bytes": outcome.bytes, "write_s": outcome.write_s, "error": outcome.error})
            if outcome.error is None:
                try:
                    self._completed(outcome.step)
                except OSError as error:
                    log.warning("after the checkpoint of step %d: %s", outcome.step, error)
            return
        reports.tell(self._rank, report)
        heard = reports.hear([_OUTCOME], self._timeout_s + _MARGIN_S).get(_OUTCOME)
        heard = heard or {"error": f"rank 0 did not answer within {self._timeout_s + _MARGIN_S:.0f} s"}
        outcome.bytes, outcome.write_s = heard.get("bytes", 0), heard.get("write_s", 0.0)
        outcome.error = heard["error"]

    def _write_own(self, into: Path, copies: Sequence[Piece]) -> dict[str, Any]:
        """Write this rank's part, and say what it holds, or why it could not be written."""
        path = into / part_name(self._rank, self._world_size)
        try:
            if self._rank == 0:
                self._clear(but=into.name)
            into.mkdir(parents=True, exist_ok=True)
            written = write_part(path, copies)
        except Exception as error:
            with suppress(OSError):
                path.unlink()  # its room may be what the other ranks need
            return {"error": f"rank {self._rank} on {socket.gethostname()}: {_reason(error)}"}
        tensors: dict[str, dict[str, Any]] = {}
        for piece in copies:
            new: dict[str, Any] = {"shape": list(piece.shape), "dtype": DTYPES[piece.values.dtype], "pieces": []}
            entry = tensors.setdefault(piece.name, new)
            if piece.values.numel():
                entry["pieces"].append([piece.start, piece.values.numel()])
        return {"file": path.name, **asdict(written), "tensors": tensors}

    def _clear(self, but: str) -> None:
        """Remove what earlier saves have left that did not end."""
        for kind in ("writing", "replaced", "deleted"):
            for leftover in self._folder.glob(f".*.{kind}"):
                if leftover.name != but:
                    shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self._folder.glob(".*.new"):  # of a small file; another thread may be writing one now
            if f".{os.getpid()}." not in leftover.name:
                leftover.unlink(missing_ok=True)

    def _reports_of_all(self, own: dict[str, Any], reports: Reports) -> list[dict[str, Any]]:
        """The reports of all ranks, in their order.

        Raises:
            ValueError: a rank could not write its part, or said nothing.
        """
        others = range(1, self._world_size)
        heard = {0: own} | reports.hear(others, self._timeout_s, remove=True)
        errors = [report["error"] for report in heard.values() if "error" in report]
        missing = [rank for rank in others if rank not in heard]
        if missing:
            ranks = ", ".join(map(str, missing))
            errors.append(f"rank {ranks} did not write its part within {self._timeout_s:.0f} s")
        if errors:
            raise ValueError("; ".join(errors[:3]))
        return [heard[rank] for rank in range(self._world_size)]

    def _complete(self, folder: Path, reports: Sequence[dict[str, Any]], texts: Mapping[str, str]) -> int:
        """Make a checkpoint of the parts; its bytes.

        Raises:
            OSError: a file cannot be written.
            ValueError: the parts are not those of one state, or are not in this folder.
        """
        into = writing(folder)
        index = Index()
        for report in reports:
            file = report["file"]
            _await_file(into / file, report["bytes"])
            index.files[file] = FileEntry(report["bytes"], report["sha256"])
            for name, entry in report["tensors"].items():
                spans = [Span(file, start, length) for start, length in entry["pieces"]]
                index.add(name, entry["shape"], entry["dtype"], spans)
        index.finish()
        for name, text in texts.items():
            write_whole(into / name, text)
            index.files[name] = FileEntry((into / name).stat().st_size, sha256(into / name))
        index.write(into)
        for other in {path.name for path in into.iterdir()} - index.files.keys() - {INDEX}:
            (into / other).unlink()  # of a job with other ranks that was killed while it wrote the same step
        _flush_folder(into)
        _publish(into, folder)
        return sum(entry.bytes for entry in index.files.values())


def _with_ranks(texts: Mapping[str, str], reports: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The texts, with what ranks have added to the state of the training batches."""
    ranks = [report["stream"] for report in reports]
    if not any(ranks):
        return dict(texts)
    return {**texts, STREAM: json.dumps({**json.loads(texts[STREAM]), "ranks": ranks})}


def _publish(into: Path, folder: Path) -> None:
    """Give a checkpoint its name, and name it in `latest`.

    A checkpoint of the same step may be there: it is damaged, or an earlier run has left it, which went on from another
    one. This run does not continue from it, so it does not matter if a kill between the two renames loses it.

    Raises:
        OSError: that is not possible. Everything is as it was before.
        ValueError: the one that is there is being read.
    """
    replaced = folder.with_name(f".{folder.name}.replaced")
    with unless_read(folder) as free:
        if not free:
            raise ValueError(f"an older {folder} is being read")
        try:
            if folder.exists():
                folder.rename(replaced)
            into.rename(folder)
            write_whole(folder.parent / LATEST, folder.name)
        except OSError:
            # Whichever of the two was done; a folder that is not empty is never replaced.
            with suppress(OSError):
                folder.rename(into)
            with suppress(OSError):
                replaced.rename(folder)
            raise
    _flush_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _await_file(path: Path, size: int) -> None:
    """Wait until a file that another rank has written is seen here.

    Raises:
        ValueError: it is not.
    """
    until = time.monotonic() + _APPEARS_S
    while not (path.is_file() and path.stat().st_size == size):
        if time.monotonic() >= until:
            where = path.parent.parent
            raise ValueError(f"{path.name} is not in {where}: run.dir must be on a disk that all ranks share")
        time.sleep(0.1)


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return str(error) or type(error).__name__
