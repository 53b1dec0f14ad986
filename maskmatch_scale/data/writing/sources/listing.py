"""Files below a folder of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.sources.store_image import EXTENSIONS


def folder(path: Path, what: str) -> Path:
    """The path, if it is a folder; otherwise a DataError that says what should be there."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; {what}")
    return path


def images_below(root: Path, start: str = "", leave_out: Iterable[str] = ()) -> list[str]:
    """Images below a folder, relative to `root`, sorted; hidden files and folders are passed over.

    Args:
        root: what the paths are relative to.
        start: the folder, relative to `root`.
        leave_out: folders that are not entered, relative to `root`.
    """
    return [path for path in files_below(root, start, leave_out) if is_image(path)]


def is_image(path: str) -> bool:
    """Whether a file is taken for an image, by its ending."""
    return path[path.rfind(".") :].lower() in EXTENSIONS


def files_below(root: Path, start: str = "", leave_out: Iterable[str] = ()) -> list[str]:
    """All files below a folder, relative to `root`, sorted; hidden files and folders are passed over.

    Links are followed, but no folder is entered within itself.

    Args:
        root: what the paths are relative to.
        start: the folder, relative to `root`.
        leave_out: folders that are not entered, relative to `root`.

    Raises:
        DataError: a folder cannot be listed.
    """
    found: list[str] = []
    closed = {str((root / path).resolve()) for path in leave_out}
    # Folders still to enter, each with the real paths it lies in.
    waiting: list[tuple[str, frozenset[str]]] = [(start, frozenset())]
    while waiting:
        relative, within = waiting.pop()
        real = str((root / relative).resolve())
        if real in closed or real in within:
            continue
        try:
            with os.scandir(root / relative) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = f"{relative}/{entry.name}" if relative else entry.name
                    if entry.is_dir():
                        waiting.append((path, within | {real}))
                    else:
                        found.append(path)
        except OSError as error:
            raise DataError(f"{root / relative}: cannot be listed ({error.strerror})") from None
    return sorted(found)
