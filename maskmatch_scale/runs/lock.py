"""One live run a folder: a file `.lock` in the run directory names the process that writes there.

Locks of the kernel (`data/remote/file_locks.py`) do not reach other machines on every network disk, and say nothing
about who has them. So the lock is a file whose existence counts. It is made by a hard link, which succeeds for one of
several processes on every file system that has links, NFS included; elsewhere by an exclusive creation.

A lock whose owner is dead is taken over. On the owner's machine the process is looked at, its start too, because
numbers of processes are used again. From other machines it cannot be seen: its owner touches the file every
`BEAT_S` seconds, and it is dead if nothing has touched it for `SILENT_S`, by the clock of the one who waits.

Who takes over must not destroy the lock of somebody who has just done so: a file may be replaced only while holding a
lock on its replacement (a file beside it, named after the dead owner), and if it still names the dead owner then.

Decision: docs/decisions/0047-lock-of-a-run-folder.md.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from maskmatch_scale.engine.processes import Process
from maskmatch_scale.errors import UserError
from maskmatch_scale.files import write_whole
from maskmatch_scale.record.run_folder import RunFolder

BEAT_S = 10.0
"""Seconds between two touches by a live owner."""
SILENT_S = 60.0
"""Seconds without a touch after which an owner on another machine is dead."""
_UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Owner:
    """The process that writes to a run directory."""

    host: str
    process: Process
    since: str
    """Date and time, ISO 8601."""
    token: str
    """Unlike that of any other owner."""

    @classmethod
    def this(cls) -> Owner:
        """This process, from now on."""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), Process.own(), since, uuid.uuid4().hex[:12])

    @classmethod
    def from_json(cls, text: str) -> Owner:
        """Read what `json.dumps(asdict(owner))` gives."""
        values = json.loads(text)
        return cls(**values | {"process": Process(**values["process"])})

    def __str__(self) -> str:
        return f"process {self.process.number} on {self.host}, since {self.since}"


class OccupiedError(UserError):
    """Another live run writes to the folder."""


class FolderLock:
    """The lock of a run directory, held by this process from its creation until :meth:`release`.

    Args:
        folder: run directory; it is made if it is not there.

    Raises:
        OccupiedError: another live process has it. The folder is as it was before.
        UserError: nothing can be written there.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.owner = Owner.this()
        self.dead: Owner | None = None
        """From whom the lock was taken over."""
        self._take()

    def move_aside(self, aside: Path) -> None:
        """Rename the folder, and make an empty one in its place, with the same lock.

        Raises:
            OccupiedError: another run has come in between, and has made it.
        """
        self._rest()
        self._folder.path.rename(aside)
        RunFolder(aside).lock.unlink()
        self._take()

    def release(self) -> None:
        """Let others write to the folder."""
        self._rest()
        with suppress(OSError):
            if _read(self._folder.lock) == self.owner:
                self._folder.lock.unlink()

    def _take(self) -> None:
        made: list[Path] = []
        try:
            made = _make_folders(self._folder.path)
            self.dead = _take(self._folder.lock, self.owner, self._folder.path)
        except BaseException as error:
            for path in made:
                with suppress(OSError):  # somebody else writes there now
                    path.rmdir()
            if isinstance(error, OSError):
                raise UserError(f"run.dir={self._folder.path}: cannot be written to ({error.strerror})") from None
            raise
        self._resting = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(self._resting,), name="folder-lock", daemon=True)
        self._thread.start()

    def _rest(self) -> None:
        self._resting.set()
        self._thread.join()

    def _beat(self, resting: threading.Event) -> None:
        path = self._folder.lock
        while not resting.wait(BEAT_S):
            try:
                found = _read(path)
                if found == self.owner:
                    os.utime(path)
                    continue
                if found is None and _create(path, self.owner):
                    continue  # somebody has removed it
                found = _read(path)
            except OSError:
                continue  # a disk that does not answer now
            if found is not None and found.token != _UNREADABLE:
                # This process was silent for too long, for example stopped. It must not write there again.
                line = f"{found} has taken {path.parent} over, which was this run's; ended at once"
                os.write(2, f"maskmatch: error: {line}\n".encode())
                os._exit(1)


def refuse_live_run(folder: RunFolder) -> None:
    """Refuse to start if a process that can be seen from here has the folder; nothing is changed.

    Raises:
        OccupiedError: names the process.
    """
    with suppress(OSError):
        found = _read(folder.lock)
        if found is not None and found.process.state in ("running", "stopped"):
            raise _occupied(folder.path, found)


def _occupied(folder: Path, owner: Owner) -> OccupiedError:
    return OccupiedError(
        f"run.dir={folder}: another run writes there ({owner}); wait for it, stop it (docs/stopping.md), or give this "
        "run a directory of its own"
    )


def _make_folders(path: Path) -> list[Path]:
    """Make a folder and those above it; returns those that were not there, the innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing


def _take(path: Path, owner: Owner, folder: Path) -> Owner | None:
    """Make the file of a lock; returns the dead owner whose lock it was.

    Raises:
        OccupiedError: its owner lives.
    """
    while not _create(path, owner):
        found = _read(path)
        if found is None:
            continue  # released meanwhile
        if _lives(path, found):
            raise _occupied(folder, found)
        succession = path.with_name(f"{path.name}.{found.token}")
        _take(succession, owner, folder)
        try:
            if _read(path) == found:
                write_whole(path, json.dumps(asdict(owner)))
                return found
        finally:
            succession.unlink()
    return None


def _create(path: Path, owner: Owner) -> bool:
    """Make a file that names its owner, unless there is one."""
    content = json.dumps(asdict(owner)).encode()
    beside = path.with_name(f"{path.name}.{owner.token}.new")
    try:
        write_whole(beside, content)
        try:
            os.link(beside, path)
        except FileExistsError:
            # A network disk may repeat a request whose answer was lost, and find its own file.
            return beside.stat().st_nlink == 2
        except OSError:  # a file system without links
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                return False
            try:
                os.write(descriptor, content)
            finally:
                os.close(descriptor)
        return True
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> Owner | None:
    """Whom a lock names; None: there is no lock."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read()
            return Owner.from_json(text)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        # Made without links a moment ago, or by a process that died while it wrote.
        return Owner("unknown", Process(0, "unknown"), "unknown", _UNREADABLE)


def _lives(path: Path, owner: Owner) -> bool:
    """Whether the owner of a lock lives. Of another machine's this takes up to `SILENT_S` seconds."""
    state = owner.process.state
    if state != "unknown":
        return state != "ended"
    touched = _touched(path)
    print(  # noqa: T201
        f"{path.parent} belongs to another run ({owner}); waiting up to {SILENT_S:g} s for a sign of life",
        file=sys.stderr,
        flush=True,
    )
    until = time.monotonic() + SILENT_S
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENT_S / 10))
        if _touched(path) != touched:
            return _read(path) is not None
    return False


def _touched(path: Path) -> int | None:
    """When a file was last touched, in ns; None: it is gone. Opening it makes a network disk ask its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
