"""Where shards of other machines are kept if the recipe does not say it: on a local disk of this machine.

Home directories of clusters often lie on a network. A cache there would be slow, would fill a quota, and would be one
for all machines of a job. So candidates are taken by the type of their file system.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_NAME = "maskmatch_scale"
_MOUNTS = Path("/proc/self/mounts")
_ON_A_NETWORK = re.compile(
    "acfs|afs|autofs|beegfs|beegfs_nodev|ceph|cifs|coda|davfs|gfs|gfs2|glusterfs|gpfs|lustre|mmfs|ncpfs|nfs|nfs4|ocfs2|"
    "orangefs|panfs|pvfs2|smb3|smbfs|wekafs"
)
_LOCAL_FUSE = frozenset(("fuseblk", "fuse.fuse-overlayfs", "fuse.overlayfs", "fuse.ntfs-3g"))
"""File systems of FUSE that lie on a disk of the machine; most others are on a network."""
_IN_MEMORY = frozenset(("tmpfs", "ramfs", "devtmpfs"))
_SCRATCH = ("SLURM_TMPDIR", "LOCAL_SCRATCH", "TMPDIR")
"""Variables by which clusters name a folder on a disk of the machine."""


class Candidate(NamedTuple):
    """A folder that the cache may lie in.

    Attributes:
        path: the folder of the cache.
        is_shared: whether others can write to the folder above it.
    """

    path: Path
    is_shared: bool


def default_cache() -> Path:
    """The folder of the cache, by the environment and the file systems that are mounted.

    The first that is on a local disk of: ``$XDG_CACHE_HOME``, ``~/.cache``, ``$SLURM_TMPDIR``, ``$LOCAL_SCRATCH``,
    ``$TMPDIR``, ``/tmp``. Without such a disk, one in memory; without that, ``/tmp``.

    Where others can write to the folder above it, one is made here that is this user's alone: they are not to read the
    shards.
    """
    return _chosen(tuple(_candidates(os.environ)))


def on_this_machine(cache: Path) -> Path:
    """The folder of a cache, or the default one if it lies on a network: for files that are mapped.

    What another machine removes there while it is mapped here ends this process by SIGBUS.
    """
    return default_cache() if is_shared_by_machines(cache) else cache


def describe(cache: Path) -> str:
    """The folder of a cache and the type of its file system, for the log."""
    kind = file_system(cache, _mounts())
    return f"{cache} ({kind}{', in memory' if kind in _IN_MEMORY else ''})" if kind else str(cache)


def _candidates(environment: Mapping[str, str]) -> list[Candidate]:
    own = [Path(environment["XDG_CACHE_HOME"])] if environment.get("XDG_CACHE_HOME") else []
    with suppress(RuntimeError):  # this user has no home
        own.append(Path.home() / ".cache")
    scratch = [Path(environment[name]) for name in _SCRATCH if environment.get(name)]
    user = f"{_NAME}-{os.getuid()}"
    return [
        *(Candidate(folder / _NAME / "shards", False) for folder in own),
        *(Candidate(folder / user / "shards", True) for folder in [*scratch, Path("/tmp")]),
    ]


@lru_cache(maxsize=8)
def _chosen(candidates: tuple[Candidate, ...]) -> Path:
    for candidate in candidates:
        _there(candidate.path)  # what is mounted when it is first looked at
    path, is_shared = choose(candidates, _mounts())
    if is_shared:
        with suppress(OSError):  # it is said when the cache is used
            path.parent.mkdir(mode=0o700, exist_ok=True)
    return path


def choose(candidates: tuple[Candidate, ...], mounts: Mapping[str, str]) -> Candidate:
    """The first candidate on a local disk; then the first in memory; then the last one.

    Args:
        candidates: in the order of preference.
        mounts: types of file systems by the path where they are mounted.
    """
    usable = [candidate for candidate in candidates if _is_usable(candidate)]
    kinds = [file_system(candidate.path, mounts) for candidate in usable]
    for wanted in (False, True):
        for candidate, kind in zip(usable, kinds, strict=True):
            if not _is_on_a_network(kind) and (kind in _IN_MEMORY) == wanted:
                return candidate
    return candidates[-1]


def _is_usable(candidate: Candidate) -> bool:
    """Whether the folder can be written to, and no other user has made it."""
    own = candidate.path.parent
    if candidate.is_shared:
        try:
            if own.is_symlink() or own.stat().st_uid != os.getuid():
                return False
        except OSError:  # it is not there, as a rule
            pass
    there = _there(candidate.path)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists, as far as this user may see."""
    for folder in (path, *path.parents):
        with suppress(PermissionError):  # a home directory of another user, say, that a container leaves to this one
            if folder.exists():
                return folder
    return Path("/")


def file_system(path: Path, mounts: Mapping[str, str]) -> str:
    """Type of the file system that a path lies on, or would lie on; empty if it is not known.

    Args:
        path: it need not exist.
        mounts: see :func:`choose`.
    """
    real = Path(os.path.realpath(path))
    return next((mounts[str(folder)] for folder in (real, *real.parents) if str(folder) in mounts), "")


def is_shared_by_machines(path: Path) -> bool:
    """Whether a path lies on a network, where other machines may remove or replace a file that this one has mapped."""
    return _is_on_a_network(file_system(path, _mounts()))


def _is_on_a_network(kind: str) -> bool:
    return _ON_A_NETWORK.fullmatch(kind) is not None or (kind.partition(".")[0] == "fuse" and kind not in _LOCAL_FUSE)


def _mounts() -> dict[str, str]:
    try:
        return parse_mounts(_MOUNTS.read_text(errors="surrogateescape"))
    except OSError:  # not on Linux
        return {}


def parse_mounts(table: str) -> dict[str, str]:
    """Types by path, of lines as in ``/proc/mounts``; of several at one path the last one, which hides the others."""
    found = {}
    for fields in map(str.split, table.splitlines()):
        if len(fields) >= 3:
            path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[1])
            found[path] = fields[2]
    return found
