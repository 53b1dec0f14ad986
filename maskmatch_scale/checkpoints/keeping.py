"""Which checkpoints of a run are kept, and the files `latest` and `best`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from maskmatch_scale.checkpoints.finding import steps_in
from maskmatch_scale.checkpoints.layout import BEST, folder_name, step_in_name
from maskmatch_scale.checkpoints.reading import unless_read
from maskmatch_scale.files import write_whole

log = logging.getLogger("maskmatch_scale")


@dataclass(frozen=True)
class Keep:
    """What is kept: keys of the recipe's section `run`."""

    last: int
    every: int
    best: int


def best_of(scores: Mapping[int, float], count: int) -> list[int]:
    """The ``count`` steps with the highest mIoU, the best first; of equal ones the earlier is better."""
    return sorted(scores, key=lambda step: (-scores[step], step))[:count]


def kept(steps: Collection[int], newest: int, scores: Mapping[int, float], keep: Keep) -> set[int]:
    """The steps whose checkpoints are kept.

    Args:
        steps: of all complete checkpoints in a folder.
        newest: step of the one that was written last. It is kept. So are those of later steps: an earlier run has left
            them, which went on from another one.
        scores: mIoU of steps that were evaluated.
        keep: what the recipe asks for.
    """
    until = sorted(step for step in steps if step <= newest)
    result = {step for step in steps if step >= newest} | set(until[-keep.last :] if keep.last else ())
    result |= {step for step in until if keep.every and step % keep.every == 0}
    return result | set(best_of({step: miou for step, miou in scores.items() if step in until}, keep.best))


class Keeper:
    """Keeps the checkpoints of one folder as the recipe asks. Every rank has one, so that all know the best steps.

    Args:
        folder: `RUN/checkpoints`.
        keep: what the recipe asks for.
        start: step that the run continues from: what was evaluated after it is evaluated again.
        writes: whether this rank writes and deletes files.
    """

    def __init__(self, folder: Path, keep: Keep, start: int, *, writes: bool) -> None:
        self._folder, self._keep, self._writes = folder, keep, writes
        self._lock = Lock()
        self._scores = {step: miou for step, miou in _read_best(folder / BEST).items() if step <= start}

    def scored(self, step: int, miou: float) -> None:
        """Note the teacher's mIoU at a step; all ranks call it together.

        `best` names the step's checkpoint from now on, also while it is still being written: readers pass over one
        that is not there.
        """
        with self._lock:
            self._scores[step] = miou
            self._write_best()

    def is_best(self, step: int) -> bool:
        """Whether a step is among the best ones that the recipe asks for."""
        return step in best_of(self._scores, self._keep.best)

    def lost(self, step: int) -> None:
        """The checkpoint of a step could not be written; all ranks call it together."""
        with self._lock:
            if self._scores.pop(step, None) is not None:
                self._write_best()

    def tidy(self, newest: int) -> None:
        """Delete the checkpoints that are not kept, except one that is being read; what cannot be deleted is logged.

        Any thread of the rank that writes may call it.

        Args:
            newest: step of the one that was written last.
        """
        with self._lock:
            there = steps_in(self._folder)
            for step in sorted(there.keys() - kept(there, newest, self._scores, self._keep)):
                delete(there[step])
            self._write_best()

    def _write_best(self) -> None:
        if not self._writes:
            return
        there = steps_in(self._folder)
        best, complete = (
            best_of(scores, self._keep.best)
            for scores in (self._scores, {step: miou for step, miou in self._scores.items() if step in there})
        )
        if not best:
            return
        named = best_of({step: self._scores[step] for step in {*best, *complete}}, len(self._scores))
        try:
            text = "".join(f"{folder_name(step)} {self._scores[step]!r}\n" for step in named)
            write_whole(self._folder / BEST, text)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._folder / BEST, error)


def delete(folder: Path) -> bool:
    """Delete a checkpoint, unless somebody reads it; whether it is gone. What cannot be deleted is logged."""
    with unless_read(folder) as free:
        if not free:
            log.info("%s is kept while it is being read", folder)
            return False
        gone = folder.with_name(f".{folder.name}.deleted")
        try:
            folder.rename(gone)  # at once, so that nothing half-deleted has its name
            shutil.rmtree(gone)
        except OSError as error:
            log.warning("%s cannot be deleted: %s", folder, error)
            return False
    return True


def _read_best(path: Path) -> dict[int, float]:
    """The steps and mIoU in `best`; lines that cannot be read are left out."""
    scores: dict[int, float] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return scores
    for line in lines:
        name, _, miou = line.partition(" ")
        step = step_in_name(name)
        with suppress(ValueError):
            if step is not None:
                scores[step] = float(miou)
    return scores
