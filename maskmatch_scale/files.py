"""One way to write a file so that a reader, or a machine that loses power, sees it whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file beside its place, flush it to the disk, and rename it.

    Args:
        path: its place; what was there is replaced. The folder must exist.
        content: bytes, or text that is written as UTF-8.
    """
    beside = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
