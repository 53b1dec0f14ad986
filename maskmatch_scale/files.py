"""Writing a file so that it is there whole or not at all, for readers and after a crash; and the checksum of a file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file under another name in the same folder, flush it to the disk, and rename it.

    Args:
        path: the file; it is replaced if it exists. Its folder must exist.
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


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
