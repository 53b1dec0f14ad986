"""Addresses and texts without the passwords and tokens that may be in an address.

Addresses of shards may carry credentials: `https://user:password@host/…`, `…?X-Amz-Signature=…`, `…?sig=…` of Azure, or
a header in a `pipe:` command. They are needed to fetch, and must not be in anything that is printed, logged or
recorded.

Decision: docs/decisions/0049-secrets-and-disks.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PIPE = "pipe:"
"""How an address begins that is a shell command."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
# Not preceded by a letter, so that of `filecache::https://…` the whole is one address.
_ADDRESS = re.compile(r"(?<![A-Za-z0-9+.:-])[A-Za-z][A-Za-z0-9+.:-]*://[^\s'\"<>`]*")
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
# A password with an unescaped slash: what looks like a port is no number (`zip://x.tar::https://…` has a scheme there).
_USER_WITH_SLASH = re.compile(r"(?<=://)[^/?#:@\s]+:(?!\d*(?:[/?#]|$))(?!:)[^@\s]*@")
_QUERY_ALONE = re.compile(r"\?[^\s'\"<>`?]*=[^\s'\"<>`]*")
_HEADER = re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic|token)\s+)?[^\s'\",;]+", re.IGNORECASE)


def is_remote(location: str | Path) -> bool:
    """Whether a location is an address: ``scheme://…`` (also ``file://``) or ``pipe:…``. A Path never is."""
    return isinstance(location, str) and (location.startswith(PIPE) or _SCHEME.match(location) is not None)


def shown(location: str) -> str:
    """A path or an address as messages show it: an address without user, password, query and fragment.

    Of a command, only its name and the files that it names are shown.
    """
    if location.startswith(PIPE):
        words = [word for word in location.removeprefix(PIPE).split() if not re.match(r"\w+=", word)]
        files = [shown(word.strip("'\"")) for word in words[1:] if _names_a_file(word.strip("'\""))]
        return " … ".join([PIPE + Path(words[0]).name if words else PIPE, *files])
    if not is_remote(location):
        return location
    return _USER.sub("", re.split(r"[?#]", _USER_WITH_SLASH.sub("", location), maxsplit=1)[0])


def redacted(text: str) -> str:
    """A text in which each address is as :func:`shown` shows it.

    What follows `pipe:` in a text is left as it is, because nothing says where the command ends: whoever writes a
    message about one puts :func:`shown` of it into the message. Headers `Authorization` are cut there, too.
    """
    if "://" in text:
        text = _ADDRESS.sub(_shown_match, text)
    if "?" in text:
        text = _QUERY_ALONE.sub("", text)
    return _HEADER.sub(r"\1…", text)


def redacted_values(content: Any) -> Any:
    """Nested JSON values, such as a recipe's, with :func:`shown` of every string that is an address."""
    if isinstance(content, Mapping):
        return {key: redacted_values(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redacted_values(value) for value in content]
    return shown(content) if isinstance(content, str) and is_remote(content) else content


def has_secret(content: Any) -> bool:
    """Whether an address in nested JSON values carries what :func:`shown` leaves out."""
    return bool(redacted_values(content) != content)


def _shown_match(match: re.Match[str]) -> str:
    address = match.group()
    kept = address.rstrip(".,:;)]}")  # punctuation of the sentence
    return shown(kept) + address[len(kept) :]


def _names_a_file(word: str) -> bool:
    return is_remote(word) or re.fullmatch(r"[\w./-]+\.(tar|tgz|json)(\.\w+)?", word) is not None
