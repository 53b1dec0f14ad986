"""Writing files and folders so that they are there whole or not at all, and what a disk says if they cannot be;
and the checksum of a file.

Everything here raises an OSError with the number of the system and the path of the file that was to be written, also
where the system or a library in Rust names neither. :func:`disk_fault` makes a line for the user of it.

Decision: docs/decisions/0049-secrets-and-disks.md.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_ELSEWHERE = "name a folder that can be written to, or change its permissions"
_FAULTS = {
    errno.ENOSPC: ("no room is left on this disk (bytes or number of files)", "free some, or name another disk"),
    errno.EDQUOT: ("your quota on this disk is used up", "remove files of yours there, or name another disk"),
    errno.EROFS: ("this disk is read-only", "name a folder that can be written to"),
    errno.EACCES: ("no permission", _ELSEWHERE),
    errno.EPERM: ("not permitted", _ELSEWHERE),
    errno.EFBIG: ("larger than this disk or a limit (`ulimit -f`) allows", "name another disk, or raise the limit"),
    errno.EIO: ("the disk fails (input/output error)", "look at the system's log; name another disk"),
    errno.ESTALE: ("the network disk has lost it", "mount the disk again"),
    errno.ENOTDIR: ("a file stands where a folder is needed", "name another path"),
    errno.EEXIST: ("a file stands where a folder is needed", "name another path"),
    errno.ENOENT: ("no such file, or no folder to hold it", "make the folder, or name another path"),
    errno.EISDIR: ("it is a folder", "name a file"),
    errno.ENAMETOOLONG: ("its name is too long for this disk", "name a shorter one"),
}


def disk_fault(error: BaseException) -> str | None:
    """One line on an error that a disk, its permissions or a path that was named is the reason for.

    Returns:
        The file, the reason and what to do; None for every other error, which is not to be shortened.
    """
    if not isinstance(error, OSError) or error.errno not in _FAULTS or error.filename is None:
        return None
    reason, advice = _FAULTS[error.errno]
    return f"{os.fsdecode(error.filename)}: {reason}; {advice}"


@contextmanager
def writing(path: Path) -> Generator[None, None, None]:
    """Let errors of the body name the file that it writes.

    Errors of writing and closing name no file, those of opening may name a hidden one beside it, and those of
    safetensors (Rust) are no OSError but have its number in their text. Errors that name another file are left alone.

    Args:
        path: the file as the user knows it.

    Raises:
        OSError: in place of the error of the body, with ``path``.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or not _is_beside(error.filename, path):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _is_beside(name: str | bytes | None, path: Path) -> bool:
    """Whether an error names no file, or one beside ``path`` with its name in it."""
    if name is None:
        return True
    other = Path(os.fsdecode(name))
    return other.parent == path.parent and path.name in other.name


def write_whole(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Write a file under another name in the same folder, flush it to the disk, and rename it.

    Args:
        path: the file; it is replaced if it exists. Its folder must exist.
        content: bytes, or text that is written as UTF-8.
        mode: permissions of the file, less those that the umask takes.

    Raises:
        OSError: it cannot be written, with ``path``. The file is as it was before.
    """
    with (
        file_whole(path) as beside,
        open(beside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file,
    ):
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def file_whole(path: Path) -> Generator[Path, None, None]:
    """Make a file that is there complete or not at all.

    Args:
        path: the file; it is replaced if it exists. Its folder must exist.

    Yields:
        A hidden path beside it, for the body to write a file to. At the end that is flushed to the disk and renamed. If
        the body fails it is removed, and ``path`` is as it was before.

    Raises:
        OSError: it cannot be written, with ``path``.
    """
    # Random, because processes in containers may have the same number.
    beside = path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(4)}.new")
    with writing(path):
        try:
            yield beside
            descriptor = os.open(beside, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            beside.replace(path)
        except BaseException:
            with suppress(OSError):  # a disk that is read-only now
                beside.unlink(missing_ok=True)
            raise


def name_of_unfinished(name: str) -> str | None:
    """The name that a file of :func:`file_whole` was to have, without dots that it began with; None for another file.

    Args:
        name: of a file in a folder, such as `.a.png.0f3a27b1.new`, which a process that was killed leaves.
    """
    match = re.fullmatch(r"\.(.+)\.[0-9a-f]+\.new", name)
    return match[1] if match else None


def append_lines(path: Path, lines: Sequence[str], mode: int = 0o666) -> None:
    """Append lines to a file that one process writes: all of them or, if that fails, none.

    If the file ends within a line, because a writer was killed, that line is ended first.

    Args:
        path: the file; it is made if it does not exist.
        lines: without line breaks.
        mode: permissions of a file that is made, less those that the umask takes.

    Raises:
        OSError: they cannot be written, with ``path``. The file is as it was before.
    """
    content = "".join(f"{line}\n" for line in lines).encode()
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)
        size = os.fstat(descriptor).st_size
        try:
            try:
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    content = b"\n" + content
                while content:
                    content = content[os.write(descriptor, content) :]
            finally:
                os.close(descriptor)  # network disks may say only now that they are full
        except BaseException:
            with suppress(OSError):
                os.truncate(path, size)
            raise


@contextmanager
def folder_whole(target: Path) -> Generator[Path, None, None]:
    """Make a folder that is there complete or not at all.

    Args:
        target: the folder; it must be empty or not exist. The folder above it is made if it does not exist.

    Yields:
        A hidden folder beside it, for the body to write into. At the end its files are flushed to the disk and it is
        renamed. If the body fails it is removed.

    Raises:
        OSError: it cannot be made, or not renamed.
    """
    beside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in sorted(beside.rglob("*")):
            if path.is_file():
                with writing(target / path.relative_to(beside)), path.open("rb") as file:
                    os.fsync(file.fileno())
        beside.replace(target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and _is_within(error.filename, beside):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def _is_within(name: str | bytes | None, folder: Path) -> bool:
    """Whether an error names no file, or one in ``folder``."""
    path = folder if name is None else Path(os.fsdecode(name))
    return path == folder or folder in path.parents


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Hex digest of all bytes of a file that is open."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
