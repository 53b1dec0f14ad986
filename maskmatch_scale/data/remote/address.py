"""Addresses of files: how a folder and a file are joined, and how messages show them.

The location of a file is a local path or an address, which is one of::

    https://host/folder/x.tar    or http://
    s3://bucket/folder/x.tar     or gs://, az://, …
    hf://datasets/x/y/x.tar      or any other scheme:// of fsspec, also file://
    pipe:COMMAND                 what a shell command prints
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from urllib.parse import quote

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.redact import PIPE, is_remote, redacted, shown

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_INDEX_ENDINGS = (".json", ".txt")


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
    address, query = cut_query(root) if is_http(root) else (root, "")
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


def cut_query(url: str) -> tuple[str, str]:
    """Split an address: up to its query or fragment, and from there on."""
    match = re.search(r"[?#]", url)
    return (url[: match.start()], url[match.start() :]) if match else (url, "")
