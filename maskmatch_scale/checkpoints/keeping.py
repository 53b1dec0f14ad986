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


def kept(steps: Collection[int], scores: Mapping[int, float], keep: Keep) -> set[int]:
    """The steps whose checkpoints are kept.

    Args:
        steps: of all complete checkpoints of a run. The newest is kept.
        scores: mIoU of steps that were evaluated.
        keep: what the recipe asks for.
    """
    result = set(sorted(steps)[-max(keep.last, 1) :])
    result |= {step for step in steps if keep.every and step % keep.every == 0}
    return result | set(best_of({step: miou for step, miou in scores.items() if step in steps}, keep.best))


class Keeper:
    """Keeps the checkpoints of one folder as the recipe asks. Rank 0 has one.

    In the folder may be checkpoints of later steps than the one that the run continues from: that were damaged, or were
    left by a run that went another way. They are not the run's own, so that no other is deleted for them, and they are
    deleted when the run has written one of a later step: it could be continued from them by mistake.

    Args:
        folder: `RUN/checkpoints`.
        keep: what the recipe asks for.
        start: step that the run continues from: what was evaluated after it is evaluated again.
    """

    def __init__(self, folder: Path, keep: Keep, start: int) -> None:
        self._folder, self._keep, self._start = folder, keep, start
        self._lock = Lock()
        self._written: set[int] = set()
        self._scores = {step: miou for step, miou in _read_best(folder / BEST).items() if step <= start}

    def scored(self, step: int, miou: float) -> None:
        """Note the teacher's mIoU at a step.

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
        """The checkpoint of a step could not be written."""
        with self._lock:
            if self._scores.pop(step, None) is not None:
                self._write_best()

    def tidy(self, newest: int) -> None:
        """Delete the checkpoints that are not kept, except one that is being read; what cannot be deleted is logged.

        Any thread may call it.

        Args:
            newest: step of the one that was written last.
        """
        with self._lock:
            self._written.add(newest)
            there = steps_in(self._folder)
            keep = kept(self._own(there), self._scores, self._keep)
            moved = [take_away(there[step]) for step in sorted(there.keys() - keep) if step <= newest]
            self._write_best()
        for folder in filter(None, moved):  # it may take long, and `scored` must not wait for it
            try:
                shutil.rmtree(folder)
            except OSError as error:
                log.warning("%s cannot be deleted: %s", folder, error)

    def _own(self, steps: Collection[int]) -> set[int]:
        """Those that are the run's own."""
        return {step for step in steps if step <= self._start or step in self._written}

    def _write_best(self) -> None:
        own = self._own(steps_in(self._folder))
        best, complete = (
            best_of(scores, self._keep.best)
            for scores in (self._scores, {step: miou for step, miou in self._scores.items() if step in own})
        )
        if not best:
            return
        named = best_of({step: self._scores[step] for step in {*best, *complete}}, len(self._scores))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # an evaluation may come before the first checkpoint
            text = "".join(f"{folder_name(step)} {self._scores[step]!r}\n" for step in named)
            write_whole(self._folder / BEST, text)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._folder / BEST, error)


def take_away(folder: Path) -> Path | None:
    """Rename a checkpoint that is to be deleted, so that nothing half-deleted has its name. Gives its new path.

    None: somebody reads it, or it cannot be renamed, which is logged.
    """
    with unless_read(folder) as free:
        if not free:
            log.info("%s is kept while it is being read", folder)
            return None
        try:
            return folder.rename(folder.with_name(f".{folder.name}.deleted"))
        except OSError as error:
            log.warning("%s cannot be deleted: %s", folder, error)
            return None


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
