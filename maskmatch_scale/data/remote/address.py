"""Addresses of files: how a folder and a file are joined, and what patterns stand for.

The location of a file is a local path or an address, which is one of::

    https://host/folder/x.tar    or http://
    s3://bucket/folder/x.tar     or any other scheme://, also file://
    pipe:COMMAND                 what a shell command prints
"""

from __future__ import annotations

import glob
import math
import os
import posixpath
import re
from pathlib import Path
from urllib.parse import quote

from braceexpand import braceexpand

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.redact import PIPE, is_remote, redacted, shown

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_INDEX_ENDINGS = (".json", ".txt")
_MOST_NAMES = 10_000_000


def join(root: str, file: str) -> str:
    """The location of a file that an index lists.

    Args:
        root: the shard folder, or the index itself (``….json``, or a list ``….txt``): a path or an address. Its query
            (the token of a signed address) is kept.
        file: a path relative to the folder, an absolute path, or an address of its own.

    Raises:
        DataError: the root is a ``pipe:``, which stands for one file and not for a folder.
    """
    if is_remote(file) or file.startswith("/"):
        return file
    if not is_remote(root):
        folder = Path(root)
        return str((folder.parent if is_index(root) else folder) / file)
    if root.startswith(PIPE):
        raise DataError(f"{shown(root)}: a pipe is one file; give {file!r} a pipe of its own in the index")
    address, query = _cut_query(root) if is_http(root) else (root, "")
    scheme = _SCHEME.match(address)
    assert scheme is not None
    path = address[scheme.end() :].rstrip("/")
    if is_index(path):
        path = path.rpartition("/")[0]
    if is_http(root):
        file = quote(file)
    if {".", ".."} & set(file.split("/")):  # to an object store these are ordinary names
        host, _, folder_path = path.partition("/")
        path = host + posixpath.normpath(f"/{folder_path}/{file}").replace("//", "/")
    else:
        path = f"{path}/{file}"
    return scheme.group() + path + query


def is_index(root: str) -> bool:
    """Whether a root, without query, is an index or a list of shards and not a folder, by its name."""
    return root.endswith(_INDEX_ENDINGS)


def expand(pattern: str) -> list[str]:
    """All the locations that a pattern stands for, in order.

    Args:
        pattern: a path or an address. Both may have braces (``x-{000..127}.tar``, ``{a,b}.tar``); a path may also have
            ``*``, ``?`` and ``[…]``. A path that exists is taken as it is, whatever characters it has.

    Raises:
        DataError: nothing matches, a path does not exist, or an address has a ``*``.
    """
    if not is_remote(pattern) and os.path.exists(pattern):  # noqa: PTH110 - Path's raises if a name is too long
        return [pattern]
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


def scrubbed(text: str, url: str) -> str:
    """What a library or command said of an address, in one line and without the secrets of the address."""
    text = text.replace(url, shown(url))
    if url.startswith(PIPE):
        text = text.replace(url.removeprefix(PIPE), shown(url))
    line = " ".join(redacted(text).split())
    return line if len(line) <= 300 else f"{line[:300]} …"


def is_http(url: str) -> bool:
    """Whether an address is fetched by HTTP."""
    return url.lower().startswith(("http://", "https://"))


def _cut_query(url: str) -> tuple[str, str]:
    """Split an address: up to its query or fragment, and from there on."""
    match = re.search(r"[?#]", url)
    return (url[: match.start()], url[match.start() :]) if match else (url, "")
