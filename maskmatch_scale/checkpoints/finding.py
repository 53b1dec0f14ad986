"""Finding a checkpoint that is whole: in a run directory, by `latest` or `best`, or by its own path."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmatch_scale.checkpoints.index import DamagedError, Index, read_index
from maskmatch_scale.checkpoints.layout import (
    BEST,
    INDEX,
    LATEST,
    STATE,
    STREAM,
    CheckpointError,
    step_in_name,
)
from maskmatch_scale.checkpoints.reading import being_read
from maskmatch_scale.files import sha256

_SMALL = (STATE, STREAM)
"""Files that are always compared with their checksums."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose index, state and sizes of files are right. The contents of its parts may not be."""

    folder: Path
    index: Index
    state: dict[str, Any]
    """The contents of `state.json`."""
    older: tuple[Path, ...] = ()
    """Those of the same run that may be taken instead, the newest first. None where this one itself was named."""
    passed_over: tuple[str, ...] = ()
    """A line for each newer one that is damaged."""

    @property
    def step(self) -> int:
        """Optimizer steps that were taken."""
        return int(self.state["step"])

    def stream(self) -> dict[str, Any]:
        """The contents of `stream.json`: the state of the training batches."""
        content: dict[str, Any] = json.loads((self.folder / STREAM).read_text())
        return content

    def instead(self, problem: str) -> Checkpoint:
        """The one before this one, which is damaged.

        Args:
            problem: what is wrong with it.

        Raises:
            CheckpointError: this one itself was named, or there is none before it.
        """
        if not self.older:
            raise _none_whole((*self.passed_over, f"{self.folder}: {problem}"))
        return _first_whole(self.older, (*self.passed_over, f"{self.folder}: {problem}"))


def find(where: Path) -> Checkpoint:
    """Find the checkpoint that a path means, without reading its parts.

    Args:
        where: a checkpoint, whatever it is called; or a run directory or its folder `checkpoints`, whose newest
            checkpoint is taken, or the one before if that is damaged; or a file `latest` or `best`.

    Raises:
        CheckpointError: there is none, it is damaged, or it has another format.
    """
    if (where / INDEX).is_file() or (where / STATE).is_file():
        return _first_whole((where,), ())
    if where.is_file() and where.name in (LATEST, BEST):
        names = [line.split()[0] for line in where.read_text().splitlines() if line.strip()]
        there = [where.parent / name for name in names if (where.parent / name).is_dir()]
        if not there:
            raise CheckpointError(f"{where}: no checkpoint that it names is there; give the path of another one")
        return _first_whole(there[:1], ())
    for folder in (where / "checkpoints", where):
        candidates = list(_newest_first(folder))
        if candidates:
            return _first_whole(tuple(candidates), ())
    raise CheckpointError(f"{where}: there is no complete checkpoint here (a file `latest` or a folder step-XXXXXXXX)")


@contextmanager
def opened(where: Path, *, checksums: bool = True) -> Generator[Checkpoint, None, None]:
    """Find the checkpoint that a path means and compare the checksums of all of its files.

    A run that goes on meanwhile does not delete it while the body runs (:func:`being_read`).

    Args:
        where: see :func:`find`.
        checksums: False: only what :func:`find` compares. Every byte is read for the checksums, also of the optimizer.

    Raises:
        CheckpointError: there is none, it is damaged, or it has another format.
    """
    with ExitStack() as reading:
        found = find(where)
        while True:
            try:
                reading.enter_context(being_read(found.folder))
            except FileNotFoundError:  # the run has deleted it just now, so there is a newer one
                found = find(where)
                continue
            problem = first_damaged(found, list(found.index.files) if checksums else [])
            if problem is None:
                break
            found = found.instead(problem)
        yield found


def has_checkpoint(run: Path) -> bool:
    """Whether a run directory has something that :func:`find` would look at."""
    return next(_newest_first(run / "checkpoints"), None) is not None


def first_damaged(checkpoint: Checkpoint, files: list[str]) -> str | None:
    """What is wrong with the first file of a checkpoint whose checksum is not that of the index; None: nothing is."""
    for name in files:
        try:
            right = sha256(checkpoint.folder / name) == checkpoint.index.files[name].sha256
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not right:
            return damage(name)
    return None


def damage(file: str) -> str:
    """The words for a file with another checksum."""
    return f"{file} is damaged: its checksum is not that of {INDEX}"


def steps_in(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder by their steps; damaged ones are there too."""
    if not folder.is_dir():
        return {}
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return {step_of(path): path for path in sorted(inside) if (path / INDEX).is_file() or (path / STATE).is_file()}


def step_of(folder: Path) -> int:
    """The step of a checkpoint: of its `state.json`, or if that cannot be read, in its name; -1: it is in neither."""
    try:
        return int(json.loads((folder / STATE).read_text())["step"])
    except (KeyError, OSError, TypeError, ValueError):
        named = step_in_name(folder.name)
        return -1 if named is None else named


def old_teacher(where: Path) -> Path | None:
    """The file of a teacher's weights that a version before format 1 has left; None: there is none.

    Args:
        where: a run directory or a checkpoint.
    """
    try:
        folders = [where, where / "checkpoints" / (where / "checkpoints" / LATEST).read_text().strip()]
    except OSError:
        folders = [where]
    files = [folder / "ema.safetensors" for folder in folders if not (folder / INDEX).is_file()]
    return next((file for file in files if file.is_file()), None)


def _newest_first(folder: Path) -> Iterator[Path]:
    """The checkpoints in a folder from which a run may go on: that of `latest` first, and then those before it."""
    there = steps_in(folder)
    newest = max(there, default=-1)
    try:
        name = (folder / LATEST).read_text().strip()
    except OSError:
        name = ""
    if name and (folder / name).is_dir():
        # Later ones were left by an earlier run of this folder, which went on from another checkpoint.
        newest = step_of(folder / name)
        there[newest] = folder / name
    yield from (there[step] for step in sorted(there, reverse=True) if step <= newest)


def _first_whole(candidates: tuple[Path, ...] | list[Path], passed_over: tuple[str, ...]) -> Checkpoint:
    """The first of some checkpoints that is not damaged, as far as can be told without reading its parts.

    Raises:
        CheckpointError: all are damaged, or the first that is not has another format.
    """
    for number, folder in enumerate(candidates):
        try:
            index, state = _open(folder)
        except DamagedError as error:
            passed_over = (*passed_over, f"{folder}: {error}")
            continue
        return Checkpoint(folder, index, state, tuple(candidates[number + 1 :]), passed_over)
    raise _none_whole(passed_over)


def _none_whole(passed_over: tuple[str, ...]) -> CheckpointError:
    return CheckpointError(f"{'; '.join(passed_over)}; continue from another checkpoint, or start a new run")


def _open(folder: Path) -> tuple[Index, dict[str, Any]]:
    """Index and state of a checkpoint.

    Raises:
        DamagedError: a file is missing or has another size, or one of the small files another checksum.
        CheckpointError: it has another format.
    """
    if not (folder / INDEX).is_file() and ((folder / "engine").is_dir() or (folder / "ema.safetensors").is_file()):
        raise CheckpointError(
            f"{folder}: it was written by a version of before checkpoints had a format, and cannot be continued; start "
            f"a new run from its weights (model.pretrained={folder})"
        )
    index = read_index(folder)
    for name, entry in index.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise DamagedError(f"{name} is missing") from None
        if size != entry.bytes:
            raise DamagedError(f"{name} has {size} bytes instead of {entry.bytes}")
        if name in _SMALL and sha256(folder / name) != entry.sha256:
            raise DamagedError(damage(name))
    if not all(name in index.files for name in _SMALL):
        raise DamagedError(f"{INDEX} names no {' or '.join(_SMALL)}")
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return index, state
