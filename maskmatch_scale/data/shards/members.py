"""The members of a tar, read from its headers alone. The tar may come from anybody.

Nothing is extracted, followed or unpickled. Every size that a header claims is compared with the file before anything
is read. The bytes of long names and pax headers are bounded. Each step goes forward. So reading ends whatever the bytes
are, and raises nothing but :class:`BadSample` and OSError.

The parser is our own. It reads what the standard library's ``tarfile`` reads (ustar, GNU long names, pax paths and
sizes, base-256 sizes, checksums; a test compares the two). But ``tarfile`` recurses through chains of headers, loops on
negative sizes, allocates what a header claims, takes a damaged header for the end, and is slow: see
:func:`~maskmatch_scale.data.shards.tar.read_table`.

Decision: docs/decisions/0002-own-tar-parser.md.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from typing import BinaryIO
from zlib import adler32

from maskmatch_scale.data.faults import BadSample

_MAX_EXTENDED_BYTES = 1 << 20
"""Long names and pax headers of more bytes are refused unread."""
_MAX_NAME_BYTES = 4096
_MAX_SIZE = 10**18
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_WINDOW = 4096
"""Bytes read at once: they often include a small member (a text, a class) and the header after it."""

_REGULAR = frozenset((0, ord("0"), ord("7")))
DIRECTORY, _SPARSE, _GLOBAL, _LONG_NAME, _LONG_LINK = b"5SgLK"
_PAX = frozenset(b"xX")
_WITHOUT_BODY = frozenset(b"12346")
_KINDS = {
    **{ord(flag): "a link" for flag in "12"},
    **{ord(flag): "a device" for flag in "34"},
    ord("6"): "a pipe",
    _SPARSE: "a sparse file",
}
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")
_PAX_SIZE = re.compile(rb"\d{1,18}")
_NOT_A_TAR = {
    b"\x1f\x8b": "it is compressed by gzip; decompress it (gunzip)",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd; decompress it (zstd -d)",
    b"BZh": "it is compressed by bzip2; decompress it (bunzip2)",
    b"\xfd7zXZ": "it is compressed by xz; decompress it (unxz)",
    b"PK\3\4": "it is a zip archive; write it as a tar",
    b"<": "it looks like a web page; fetch it again",
    b"version https://git-lfs": "it is a Git LFS pointer; run git lfs pull",
}


def unsafe_member(name: str, flag: int) -> str | None:
    """Why a member must not be used, and what to do; None if it may be.

    Args:
        name: of the member.
        flag: its typeflag.
    """
    if flag not in _REGULAR:
        kind = _KINDS.get(flag, f"of unknown type {chr(flag)!r}")
        return f"member {name!r} is {kind}; store plain files"
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        return f"member {name!r} has a name that leaves the folder; rename it"
    return None


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Read ``size`` bytes at byte ``offset``; fewer at the end of the file.

    A file of the system is read by `os.pread`: exactly these bytes, where a buffer would first be filled by a whole
    block, which has 4 MiB on some network file systems; and from no position, which a forked process would share.
    """
    try:
        descriptor = file.fileno()
    except io.UnsupportedOperation:  # it is no file of the system
        file.seek(offset)
        descriptor = None
    parts = []
    # A read may return less than there is.
    while size and (data := file.read(size) if descriptor is None else os.pread(descriptor, size, offset)):
        parts.append(data)
        offset, size = offset + len(data), size - len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class TarMembers:
    """The members of a tar in order, as tuples (name, typeflag, offset of the body, size of the body), in bytes.

    The size of the last member may reach beyond the end of the file.

    Args:
        file: opened for reading.
        shard: its name in messages.

    Raises:
        BadSample: while it is iterated over: ``shard_unreadable``, the file is no tar.
    """

    file_size: int
    """Bytes of the file; known when iteration has begun."""
    header_at: int
    """Byte at which the first header of the last member begins, those of its long name included; when iteration has
    ended, that at which the tar ends."""
    damage: str
    """Why the tar ends early, known when iteration has ended; empty if it does not."""

    def __init__(self, file: BinaryIO, shard: str) -> None:
        self.file = file
        self.shard = shard
        self.file_size = 0
        self.header_at = 0
        self.damage = ""
        self._window = b""
        self._window_at = 0

    def _block(self, at: int, size: int = _BLOCK) -> bytes:
        start = at - self._window_at
        if start < 0 or start + size > len(self._window):
            self._window = read_at(self.file, at, max(size, _WINDOW))
            self._window_at, start = at, 0
        return self._window[start : start + size]

    def __iter__(self) -> Iterator[tuple[str, int, int, int]]:
        self.file_size = self.file.seek(0, 2)
        at = 0
        # What headers before a member say of it. If several say it, the first counts.
        long_name: bytes | None = None
        long_size: int | None = None
        sparse = False
        begun_at = 0
        while True:
            header = self._block(at)
            self.header_at = begun_at
            if len(header) < _BLOCK or header == _ZEROS or not _is_header(header):
                if at == 0 and header != _ZEROS:
                    raise BadSample("shard_unreadable", f"{self.shard}: not a tar: {_what_else(header)}")
                self.damage = self._ending(header, at)
                return
            flag = header[156]
            size = _number(header[124:136])
            at += _BLOCK
            if size is None or not 0 <= size <= _MAX_SIZE:
                self.damage = f"the header at byte {at - _BLOCK} claims an impossible size"
                return

            if flag in _PAX or flag in (_LONG_NAME, _LONG_LINK, _GLOBAL):
                if size > _MAX_EXTENDED_BYTES or at + size > self.file_size:
                    self.damage = f"the header at byte {at - _BLOCK} claims {size} bytes of names"
                    return
                data = self._block(at, size)
                at += -(-size // _BLOCK) * _BLOCK
                if flag == _LONG_NAME and long_name is None:
                    long_name = data.partition(b"\0")[0]
                elif flag in _PAX and (b"path=" in data or b"size=" in data or b"GNU.sparse." in data):
                    records = _pax_records(data)
                    if records is None or (b"size" in records and not _PAX_SIZE.fullmatch(records[b"size"])):
                        self.damage = f"the pax header before byte {at} is damaged"
                        return
                    if long_name is None and b"path" in records:
                        long_name = records[b"path"].rstrip(b"/")
                    if long_size is None and b"size" in records:
                        long_size = int(records[b"size"])
                    sparse = sparse or any(keyword.startswith(b"GNU.sparse.") for keyword in records)
                if long_name is not None and len(long_name) > _MAX_NAME_BYTES:
                    self.damage = f"the header before byte {at} holds a name of {len(long_name)} bytes"
                    return
                continue

            name = header[:100].partition(b"\0")[0]
            if flag == 0 and name.endswith(b"/"):
                flag = DIRECTORY
            if header[345] and flag != _SPARSE:
                name = header[345:500].partition(b"\0")[0] + b"/" + name
            if flag == _SPARSE:
                more = header[482]
                while more:
                    extension = self._block(at)
                    at += _BLOCK
                    more = extension[504] if len(extension) == _BLOCK else 0
            if long_size is not None:
                size = long_size
            name = name if long_name is None else long_name
            yield name.decode("utf-8", "backslashreplace"), _SPARSE if sparse else flag, at, size
            if flag != DIRECTORY and flag not in _WITHOUT_BODY:
                if at + size > self.file_size:
                    self.damage = f"it ends {at + size - self.file_size} bytes too early"
                    return
                at += -(-size // _BLOCK) * _BLOCK
            long_name, long_size, sparse = None, None, False
            begun_at = at

    def _ending(self, header: bytes, at: int) -> str:
        """What is wrong with an end at byte ``at``, where ``header`` was read; empty if nothing is."""
        if header == _ZEROS:
            return ""
        if len(header) < _BLOCK:
            return f"it ends in the middle of the header at byte {at}" if header else "it has no end mark"
        return f"the header at byte {at} is damaged"


def _is_header(header: bytes) -> bool:
    """Whether the checksum is right: the sum of all bytes, with its own eight counted as spaces.

    The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521. The sum of 256 bytes is smaller than that, so
    this is a fast way to the exact sum.
    """
    stored = _number(header[148:156])
    total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
    if stored == total - sum(header[148:156]) + 256:
        return True
    # Some very old writers added up signed bytes.
    return stored == sum(byte - 2 * (byte & 128) for byte in header[:148] + header[156:]) + 256


def _number(field: bytes) -> int | None:
    """The number in an octal or base-256 field; None if it holds neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") * (1 if field[0] == 0x80 else -1)
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None


def _pax_records(data: bytes) -> dict[bytes, bytes] | None:
    """Keyword → value of a pax header, whose records are lines ``LENGTH KEYWORD=VALUE``; None if it does not parse."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        match = _PAX_RECORD.match(data, at)
        if match is None:
            return None
        end = at + int(match[1])
        if end > len(data) or end <= match.end() or data[end - 1 : end] != b"\n":
            return None
        records[match[2]] = data[match.end() : end - 1]
        at = end
    return records


def _what_else(start: bytes) -> str:
    """What a file that is no tar seems to be, by its first bytes, and what to do."""
    if not start:
        return "it is empty; fetch or write it again"
    for magic, what in _NOT_A_TAR.items():
        if start.startswith(magic):
            return what
    return "its first header is damaged; fetch or write it again"
