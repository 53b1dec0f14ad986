"""The samples of a shard in sequence, read by webdataset's own pipeline. The shard may come from anybody.

webdataset reads a tar by the standard library's `tarfile`, which is not made for tars of strangers
(:mod:`~maskmatch_scale.data.shards.members` says why). So a sieve stands between the two. It reads the headers by our
parser, and passes on what may be used: images in plain files of no more than a bound of bytes, under headers that it
writes itself. What it keeps back are faults of samples, the same and in the same words as those of
:func:`~maskmatch_scale.data.shards.tar.read_table`. webdataset then splits the tar (`tar_file_expander`) and groups its
members (`group_by_keys`). Nothing is decoded, extracted or unpickled.

The bytes of an image do not go through `tarfile`, which would copy them six times. In the tar that the sieve passes on,
each image has a number as its content, and the sieve keeps the bytes under this number.

Two things differ from a table, because nothing is known of what is still to come. A shard that ends too early has its
fault at its end. And of a sample whose members are not adjacent, the first piece is used if it has the image.

Decision: docs/decisions/0066-sequential-sources.md.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from tarfile import DIRTYPE, GNU_FORMAT, TarInfo
from typing import BinaryIO, NamedTuple, cast

from webdataset.tariterators import group_by_keys, tar_file_expander

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.remote.stream import Readable
from maskmatch_scale.data.shards.members import TarMembers, read_at, unsafe_member
from maskmatch_scale.data.shards.metadata import MAX_METADATA_BYTES, METADATA_EXTENSION
from maskmatch_scale.data.shards.reading import RawSample
from maskmatch_scale.data.shards.tar import MAX_MEMBER_BYTES, GroupedMembers, key_and_extension, plain
from maskmatch_scale.redact import shown

_BLOCK = 1 << 20
_TAR_BLOCK = 512
_NAME_BYTES = 100
_CHECKSUM = slice(148, 156)
_DIGITS = 10
"""Of the number that is passed on in place of an image."""
_ANY_SIZE = 1 << 62
"""Nobody knows how long a stream is."""


class Found(NamedTuple):
    """What a shard has next."""

    key: str | None
    """None: what is wrong is not of one sample."""
    sample: RawSample | BadSample | None
    """None: it was not wanted."""


Wanted = Callable[[bytes | None], bool]
"""Whether a sample with this `.json` member is wanted; None: it has none that can be read."""


def read_in_sequence(stream: Readable, shard: str, wanted: Wanted | None = None) -> Iterator[Found]:
    """The samples of an unlabelled shard, also the bad ones, in their order.

    Args:
        stream: the tar, from its first byte.
        shard: its path or address.
        wanted: asked for each sample, in their order; None: all are wanted.

    Raises:
        BadSample: the shard cannot be read, or not any further; what ``stream`` raised.
        DataError: what ``stream`` raised.
    """
    sieve = _Sieve(stream, shown(shard), metadata=wanted is not None)
    samples = sieve.samples
    given, any_truncated = 0, False

    def found(image: bytes | None) -> Found:
        """Sample number ``given``, with its image if there is one."""
        key = samples.keys[given].decode()
        if wanted is not None and not wanted(sieve.metadata.pop(given, None)):
            return Found(key, None)
        where = f"{sieve.shard}: sample {key!r}"
        if given in samples.faults:
            reason, what = samples.faults[given]
        elif image is None:
            reason, what = "truncated", "its image reaches beyond the end of the tar; fetch or write it again"
        else:
            return Found(key, RawSample(key, shard, image, None))
        return Found(key, BadSample(reason, f"{where}: {what}"))

    # Of what the sieve passes on, nothing can be wrong; and of a group, nothing but a member that is there twice, which
    # is among the faults.
    errors: list[Exception] = []
    files = tar_file_expander([{"url": sieve.shard, "stream": sieve}], handler=errors.append)
    for group in group_by_keys(files, keys=_key_and_extension, handler=lambda error: True):
        if sieve.failure is not None:
            break
        key = group["__key__"]
        # Samples without any member that may be used are not in a group.
        following = range(given, len(samples.keys))
        place = next((at for at in following if _without_nul(samples.keys[at].decode()) == key), None)
        if place is None:
            continue
        while given < place:
            yield found(None)
            given += 1
        yield found(sieve.image([group[extension] for extension in samples.images if extension in group]))
        given += 1
    if sieve.failure is not None:
        raise sieve.failure
    for _ in range(given, len(samples.keys)):
        last = found(None)
        any_truncated = any_truncated or (isinstance(last.sample, BadSample) and last.sample.reason == "truncated")
        yield last
        given += 1
    damage = sieve.damage or (f"webdataset cannot read on ({errors[0].args[0]})" if errors else "")
    if damage and not any_truncated:
        yield Found(None, BadSample("truncated", f"{sieve.shard}: {damage}; fetch or write it again"))
    elif not given:
        raise BadSample("shard_unreadable", f"{sieve.shard}: it holds no sample; leave it out")


def _without_nul(name: str) -> str:
    """A name as it can be in a header of a tar; only a pax header can have another one."""
    return name.replace("\0", "\\0")


def _header(name: str) -> bytes:
    """What stands in a tar before a file of this name that has `_DIGITS` bytes.

    A header is made once, and another name put in: `tarfile` takes ten times as long to write one.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > _NAME_BYTES:
        return _written_header(name)
    before, after, total = _frame()
    return b"%s%s%06o\0 %s" % (encoded.ljust(_NAME_BYTES, b"\0"), before, total + sum(encoded), after)


@cache
def _frame() -> tuple[bytes, bytes, int]:
    """What stands between name and checksum of a header, what follows the checksum, and the checksum without a name."""
    header = _written_header("")
    return header[_NAME_BYTES : _CHECKSUM.start], header[_CHECKSUM.stop :], int(header[_CHECKSUM][:6], 8)


def _written_header(name: str) -> bytes:
    header = TarInfo(name)
    header.size = _DIGITS
    return header.tobuf(GNU_FORMAT, "utf-8", "surrogateescape")


def _key_and_extension(name: str) -> tuple[str | None, str | None]:
    key, extension = key_and_extension(name)
    return (key, extension) if extension is not None else (None, None)


class _Sieve:
    """A tar with only those members that webdataset may read.

    Args:
        stream: the tar as it is.
        shard: its name in messages.
        metadata: whether `.json` members are read.
    """

    def __init__(self, stream: Readable, shard: str, *, metadata: bool = False) -> None:
        self.shard = shard
        self.samples = GroupedMembers(labelled=False)
        """Of the headers that were read so far."""
        self.damage = ""
        """Why the tar has ended early; empty if it has not."""
        self.failure: Exception | None = None
        """What the stream raised, or that it is no tar. To webdataset, which would change the message, it is an end."""
        self.metadata: dict[int, bytes] = {}
        """Place → `.json` member, of samples whose headers were read; whoever has used it removes it."""
        self._kept_extension = METADATA_EXTENSION if metadata else None
        self._file = cast(BinaryIO, _Forward(stream))
        self._members = TarMembers(self._file, shard)
        self._bodies: dict[int, bytes] = {}
        """Images that were passed on, by their numbers, until webdataset gives their sample."""
        self._passed = 0
        self._parts = self._passed_on()
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most the next ``size`` bytes, and none at the end only. They reach no further than one image."""
        if not self._rest and not self._next_part():
            return b""
        block, self._rest = self._rest[:size], self._rest[size:]
        return bytes(block)

    def image(self, numbers: Sequence[bytes]) -> bytes | None:
        """The first of the images of a sample; None if there are none. All images up to these are forgotten.

        Args:
            numbers: what was passed on in place of the images, the preferred one first.
        """
        wanted = [int(number) for number in numbers]
        image = self._bodies[wanted[0]] if wanted else None
        for number in [number for number in self._bodies if number <= max(wanted, default=-1)]:
            del self._bodies[number]
        return image

    def _next_part(self) -> bool:
        """Begin with the next part; returns whether there is one."""
        while not self._rest:
            try:
                self._rest = memoryview(next(self._parts))
            except StopIteration:
                return False
            except Exception as error:
                self.failure = error
                return False
        return True

    def _passed_on(self) -> Iterator[bytes]:
        # By the first bytes, which else are the name of an image, `tarfile` tells whether to decompress.
        folder = TarInfo("images")
        folder.type = DIRTYPE
        yield folder.tobuf(GNU_FORMAT)
        try:
            for long_name, flag, offset, size in self._members:
                self.samples.add(long_name, flag, offset, size, _ANY_SIZE)
                name = plain(long_name)
                extension = key_and_extension(name)[1]
                if unsafe_member(name, flag) or size > MAX_MEMBER_BYTES:
                    continue
                if extension is not None and extension == self._kept_extension:
                    self._keep(offset, size)
                if extension not in self.samples.images:
                    continue
                body = read_at(self._file, offset, size)
                if len(body) < size:
                    self.damage = f"it ends {size - len(body)} bytes too early"
                    self.samples.end(True)
                    return
                self._bodies[self._passed] = body
                number = b"%0*d" % (_DIGITS, self._passed)
                self._passed += 1
                yield _header(_without_nul(name)) + number.ljust(_TAR_BLOCK, b"\0")
        except OSError as error:
            raise BadSample("shard_unreadable", f"{self.shard}: cannot be read ({error}); try again") from None
        self.damage = self._members.damage
        self.samples.end(bool(self.damage))
        yield bytes(2 * _TAR_BLOCK)

    def _keep(self, offset: int, size: int) -> None:
        """Keep a `.json` member of the sample whose headers are being read."""
        if size <= MAX_METADATA_BYTES and len(content := read_at(self._file, offset, size)) == size:
            self.metadata.setdefault(len(self.samples.keys), content)


class _Forward:
    """A stream as the file that a tar is read from. What lies before the last position that was sought is forgotten.

    Args:
        stream: read from its first byte.
    """

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._held = b""
        self._held_at = self._at = 0

    def fileno(self) -> int:
        """There is none."""
        raise io.UnsupportedOperation

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position, no further back than the last time."""
        if whence == io.SEEK_END:
            return _ANY_SIZE
        gap = offset - self._held_at
        assert gap >= 0
        self._held, gap = self._held[gap:], max(0, gap - len(self._held))
        while gap and (skipped := len(self._stream.read(min(gap, _BLOCK)))):
            gap -= skipped
        self._held_at = self._at = offset
        return offset

    def read(self, size: int) -> bytes:
        """``size`` bytes from the position on; fewer at the end only."""
        start = self._at - self._held_at
        blocks: list[bytes | memoryview] = [self._held]
        missing = start + size - len(self._held)
        while missing > 0 and (block := self._stream.read(min(missing, _BLOCK))):
            blocks.append(block)
            missing -= len(block)
        if len(blocks) > 1:
            self._held = b"".join(blocks)
        found = self._held[start : start + size]
        self._at += len(found)
        return found
