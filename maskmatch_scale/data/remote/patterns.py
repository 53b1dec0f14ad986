"""What patterns of paths and addresses stand for."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote import filesystems, objects
from maskmatch_scale.data.remote.address import cut_query, is_http, scrubbed
from maskmatch_scale.data.remote.stores import Found
from maskmatch_scale.data.remote.transfer import TransferError
from maskmatch_scale.errors import of_this_rank
from maskmatch_scale.redact import PIPE, is_remote, shown

_MOST_NAMES = 10_000_000
_MOST_LISTED = 3_000_000
"""Names that are listed for one pattern: 3000 requests, some minutes."""
_TIMEOUT_S = 60.0
"""Seconds to wait for a part of a list."""
_TRIES = 3
_PAUSE_S = 2.0
"""Between two tries to list, each from the beginning."""


class Location(NamedTuple):
    """A path or address, and what is known of it without asking for it."""

    url: str
    bytes: int | None = None
    etag: str | None = None
    """A strong one."""


def expand(pattern: str) -> list[str]:
    """All the locations that a pattern stands for, in order; see :func:`expand_with_facts`."""
    return [found.url for found in expand_with_facts(pattern)]


def expand_with_facts(pattern: str) -> list[Location]:
    """All the locations that a pattern stands for, in order, and what a list of an object store says of them.

    Args:
        pattern: a path or an address. Both may have braces (``x-{000..127}.tar``, ``{a,b}.tar``). A path may also have
            ``*``, ``?`` and ``[…]``, and ``**`` for any folders; so may an address of an object store or of fsspec, if
            it has a ``*``: then what is there is listed. A path that exists is taken as it is, whatever characters it
            has.

    Raises:
        DataError: nothing matches, a path does not exist, an address cannot be listed, or a list is too long.
    """
    if not is_remote(pattern) and os.path.exists(pattern):  # noqa: PTH110 - Path's raises if a name is too long
        return [Location(pattern)]
    numbers = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in numbers) > _MOST_NAMES:
        raise DataError(f"{shown(pattern)}: stands for more than {_MOST_NAMES} files; is a number in braces too large?")
    try:
        names = list(braceexpand(pattern))
    except ValueError:
        raise DataError(f"{shown(pattern)}: its braces do not match; write x-{{000..127}}.tar") from None
    found: list[Location] = []
    for name in names:
        if name.startswith(PIPE):
            found.append(Location(name))
        elif is_remote(name):
            path = cut_query(name)[0] if is_http(name) else name
            found.extend(_listed(name) if "*" in path else [Location(name)])
        elif Path(name).exists():
            found.append(Location(name))
        elif matches := sorted(glob.glob(name, recursive=True)):  # noqa: PTH207 - absolute patterns too
            found.extend(map(Location, matches))
        else:
            raise DataError(f"{name}: no such file" + (f" (from {pattern})" if name != pattern else ""))
    if not found:
        raise DataError(f"{pattern!r}: matches no file")
    return found


def _listed(pattern: str) -> list[Location]:
    if is_http(pattern):
        raise DataError(f"{shown(pattern)}: web servers do not list their files; write x-{{000..127}}.tar")
    for attempt in itertools.count(1):
        try:
            if objects.is_object(pattern):
                found = _objects(pattern)
            else:
                found = list(map(Location, filesystems.names(pattern, _TIMEOUT_S)))
            break
        except TransferError as error:
            if error.final or attempt >= _TRIES:
                advice = error.advice or "check the network and the address, or try later"
                # Ranks list by themselves. What is final all of them are told; a network may fail for one alone.
                with nullcontext() if error.final else of_this_rank():
                    raise DataError(f"{pattern}: cannot be listed: {scrubbed(str(error), pattern)}; {advice}") from None
            time.sleep(_PAUSE_S)
    if not found:
        raise DataError(f"{pattern}: matches no file; check bucket and folder")
    return sorted(found)


def _objects(pattern: str) -> list[Location]:
    # An ordinary folder is listed whole: stores know beginnings of names only, and obstore only whole folders.
    folder = pattern[: re.search(r"[*?\[]", pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    if folder.endswith(":/"):
        raise DataError(f"{pattern}: the name of the bucket has a pattern; name one bucket")
    parts = pattern.split("/")
    found: list[Location] = []
    listed = 0
    for some in objects.listing(folder, _TIMEOUT_S):
        listed += len(some)
        if listed > _MOST_LISTED:
            raise DataError(
                f"{pattern}: more than {_MOST_LISTED} names lie below {folder}/; write x-{{000..127}}.tar, or name a "
                "folder that has fewer"
            )
        found.extend(_location(about) for about in some if _match(about.url.split("/"), parts))
    return found


def _location(about: Found) -> Location:
    # Only what is in quotes is a strong ETag, and what the store will say when the object is read.
    etag = about.version if about.version is not None and about.version.startswith('"') else None
    return Location(about.url, about.bytes, etag)


def _match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, of which `**` stands for any number of folders."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_match(names[skipped:], patterns[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _match(names[1:], patterns[1:])
