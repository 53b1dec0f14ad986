"""Names of predictions: those of the images, with the folders below the one that all images have in common."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from maskmatch_scale.redact import PIPE, is_remote

_LONGEST_BYTES = 200
"""Of the name of a file or folder. Disks allow 255, and files are written under longer names first."""


def output_names(locations: Sequence[str]) -> list[str]:
    """A name for each image file or shard, all different.

    A name is the path below the deepest folder that all files are in, without its ending. Addresses count as paths that
    begin with their host, and have a deepest folder of their own. Where two names would be equal (`a.jpg` and `a.png`),
    or one would be the folder of another, they keep their endings, and if they are equal still, get numbers.

    Args:
        locations: absolute paths and addresses, all different.

    Returns:
        Relative paths with `/`, without `..`, in the order of ``locations``.
    """
    full: list[str] = [""] * len(locations)
    for remote in (False, True):
        numbers = [number for number, location in enumerate(locations) if is_remote(location) == remote]
        paths = [_parts(locations[number]) for number in numbers]
        folders = [path[:-1] for path in paths]
        depth = next(
            (level for level, names in enumerate(zip(*folders, strict=False)) if len(set(names)) > 1),
            min(map(len, folders), default=0),
        )
        for number, path in zip(numbers, paths, strict=True):
            full[number] = "/".join(map(safe, path[depth:]))
    short = [str(PurePosixPath(name).with_suffix("")) for name in full]
    counts = Counter(short)
    above = {str(folder) for name in full for folder in PurePosixPath(name).parents}
    chosen = [name if counts[brief] > 1 or brief in above else brief for name, brief in zip(full, short, strict=True)]
    return _numbered(chosen)


def parts_of_address(address: str) -> tuple[str, str]:
    """Host and path, without port, user and query; also of what is no address, which is said when it is fetched."""
    try:
        split = urlsplit(address)
        return split.hostname or "", split.path
    except ValueError:
        return "", address.partition("://")[2]


def safe(name: str) -> str:
    """The name of a file or folder without what a path must not have: `.` and `..`, `/`, and unprintable characters.

    A name that had to be changed ends with a digest, so that different names stay different.
    """
    kept = "".join(letter if letter.isprintable() and letter != "/" else "_" for letter in name)
    kept = "_" if kept in ("", ".", "..") else kept
    encoded = kept.encode(errors="replace")
    if kept == name and len(encoded) <= _LONGEST_BYTES:
        return name
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:12]
    return f"{encoded[: _LONGEST_BYTES - 13].decode(errors='ignore')}-{digest}"


def safe_path(key: str) -> str:
    """The key of a sample in a shard, which may have folders, as a relative path."""
    return "/".join(safe(part) for part in key.split("/"))


def _parts(location: str) -> list[str]:
    """Folders and name of a file."""
    if location.startswith(PIPE):
        return ["pipe", hashlib.sha256(location.encode()).hexdigest()[:12]]
    if not is_remote(location):
        return location.split("/")
    host, path = parts_of_address(location)
    return [host, *filter(None, unquote(path).split("/"))]


def _numbered(names: list[str]) -> list[str]:
    """The names with `-2`, `-3` … behind those that an earlier one has."""
    taken, found = set(names), []
    seen: set[str] = set()
    for name in names:
        unique, number = name, 1
        while unique in seen or (number > 1 and unique in taken):
            number += 1
            unique = f"{name}-{number}"
        seen.add(unique)
        found.append(unique)
    return found
