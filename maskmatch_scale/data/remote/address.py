"""Addresses of files: which are elsewhere, how they are put together, and how they are shown.

An address is a local path, or one of::

    https://host/folder/x.tar    (http:// as well)
    s3://bucket/folder/x.tar     as every other scheme://, file:// included
    pipe:COMMAND                 what a shell command prints
"""

from __future__ import annotations

import glob
import math
import posixpath
import re
from pathlib import Path
from urllib.parse import quote

from braceexpand import braceexpand

from maskmatch_scale.data.faults import DataError

PIPE = "pipe:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_MOST_NAMES = 10_000_000


def is_remote(location: str | Path) -> bool:
    """Whether a location is an address to fetch from: ``scheme://…`` (``file://`` too) or ``pipe:…``. A Path is not."""
    return isinstance(location, str) and (location.startswith(PIPE) or _SCHEME.match(location) is not None)


def join(root: str, file: str) -> str:
    """Where a file of an index is.

    Args:
        root: the shard folder, or the index itself (``….json``): a path or an address. Its query (a signed folder's
            token) is kept.
        file: relative to the folder, an absolute path, or an address of its own.

    Raises:
        DataError: the root is a ``pipe:``, which names one file and no folder.
    """
    if is_remote(file) or file.startswith("/"):
        return file
    if not is_remote(root):
        folder = Path(root)
        return str((folder.parent if folder.suffix == ".json" else folder) / file)
    if root.startswith(PIPE):
        raise DataError(f"{shown(root)}: a pipe is one file; give {file!r} a pipe of its own in the index")
    address, query = _cut_query(root) if is_http(root) else (root, "")
    scheme = _SCHEME.match(address)
    assert scheme is not None
    path = address[scheme.end() :].rstrip("/")
    if path.endswith(".json"):
        path = path.rpartition("/")[0]
    if is_http(root):
        file = quote(file)
    if {".", ".."} & set(file.split("/")):  # object stores take them for names
        host, _, folder_path = path.partition("/")
        path = host + posixpath.normpath(f"/{folder_path}/{file}").replace("//", "/")
    else:
        path = f"{path}/{file}"
    return scheme.group() + path + query


def expand(pattern: str) -> list[str]:
    """All the files that a pattern stands for, in order.

    Args:
        pattern: a path or address, with braces (``x-{000..127}.tar``, ``{a,b}.tar``), a path also with ``*``, ``?`` and
            ``[…]``.

    Raises:
        DataError: nothing matches, a path is not there, or an address has a ``*``.
    """
    numbers = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in numbers) > _MOST_NAMES:
        raise DataError(f"{shown(pattern)}: stands for more than {_MOST_NAMES} files; is a number in braces too large?")
    try:
        names = list(braceexpand(pattern))
    except ValueError:
        raise DataError(f"{shown(pattern)}: its braces do not match; write x-{{000..127}}.tar") from None
    found = []
    for name in names:
        if name.startswith(PIPE):
            found.append(name)
        elif is_remote(name):
            if "*" in _cut_query(name)[0]:
                raise DataError(f"{shown(name)}: * is for local folders only; write x-{{000..127}}.tar")
            found.append(name)
        elif Path(name).exists():
            found.append(name)
        elif matches := sorted(glob.glob(name, recursive=True)):  # noqa: PTH207 - absolute patterns too
            found.extend(matches)
        else:
            raise DataError(f"{name}: no such file" + (f" (from {pattern})" if name != pattern else ""))
    if not found:
        raise DataError(f"{pattern!r}: matches no file")
    return found


def shown(url: str) -> str:
    """An address for messages: without user, password and query, which may be keys; of a command only its files."""
    if url.startswith(PIPE):
        words = [word for word in url.removeprefix(PIPE).split() if not re.match(r"\w+=", word)]
        files = [shown(word.strip("'\"")) for word in words[1:] if _names_a_file(word.strip("'\""))]
        return " … ".join([PIPE + Path(words[0]).name if words else PIPE, *files])
    address = _cut_query(url)[0] if is_remote(url) else url
    return re.sub(r"(?<=://)[^/]*@", "", address, count=1)


def is_http(url: str) -> bool:
    """Whether an address is fetched by HTTP."""
    return url.lower().startswith(("http://", "https://"))


def _cut_query(url: str) -> tuple[str, str]:
    """(address, ``?query`` or ``#fragment``)."""
    match = re.search(r"[?#]", url)
    return (url[: match.start()], url[match.start() :]) if match else (url, "")


def _names_a_file(word: str) -> bool:
    return is_remote(word) or re.fullmatch(r"[\w./-]+\.(tar|tgz|json)(\.\w+)?", word) is not None
