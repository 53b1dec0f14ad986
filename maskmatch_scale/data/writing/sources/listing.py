"""Files below a folder of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.sources.store_image import EXTENSIONS


def folder(path: Path, what: str) -> Path:
    """The path, if it is a folder; otherwise a DataError that names the first part that is none, and says what to do.

    Args:
        path: of the folder.
        what: what should be there, for the message.
    """
    if path.is_dir():
        return path
    first = next(each for each in (*reversed(path.parents), path) if not each.is_dir())
    raise DataError(f"{first}: {'a file, not a folder' if first.exists() else 'no such folder'}; {what}")


def folder_named(root: Path, name: str, option: str) -> str:
    """The name of a folder below another, if there is such a folder.

    Args:
        root: the other folder.
        name: of the folder, relative to it.
        option: that named it, for the message.

    Raises:
        DataError: there is none; names those that there are.
    """
    if (root / name).is_dir():
        return name
    there = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    has = f"which has {', '.join(there[:8])}{', …' if len(there) > 8 else ''}" if there else "which has no folder"
    raise DataError(f"{option} {name}: no such folder in {root}, {has}")


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
