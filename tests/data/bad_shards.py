"""Shards with every fault that has a name, made in memory. Readers and training must survive them."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.conftest import draw_shapes

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
CLASSES = 3
"""Of the label maps here, as of the `shapes` folder."""


def jpeg(seed: int, **options: object) -> bytes:
    """An image of 96 × 128 px."""
    return encode(draw_shapes(seed)[0], "JPEG", **{"quality": 90, **options})


def label_png(seed: int) -> bytes:
    """The label map of :func:`jpeg`."""
    return encode(draw_shapes(seed)[1], "PNG")


def encode(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    """Pixels in a file format."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tar_bytes(
    members: Iterable[tuple[str, bytes] | tarfile.TarInfo], tar_format: int = tarfile.GNU_FORMAT, *, end: bool = True
) -> bytes:
    """A tar of members in the given order, with or without its end; a TarInfo stands for a member without a body."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
        length = tar.offset
    return buffer.getvalue() if end else buffer.getvalue()[:length]


def checksummed(header: bytes) -> bytes:
    """A header with the checksum that belongs to it."""
    block = bytearray(header)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member that is no plain file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def sample(key: str, seed: int = 0, *, labelled: bool = True) -> list[tuple[str, bytes]]:
    """The members of a whole sample."""
    return [(f"{key}.jpg", jpeg(seed)), *([(f"{key}.png", label_png(seed))] if labelled else [])]


def whole(count: int, *, labelled: bool = True) -> bytes:
    """A tar without faults, of keys s0, s1 and so on."""
    return tar_bytes(member for n in range(count) for member in sample(f"s{n}", n, labelled=labelled))


@dataclass(frozen=True)
class BadShard:
    """A tar with faults."""

    data: bytes
    faults: tuple[tuple[str, str], ...]
    """(key, reason) of each bad sample that is found from the headers, in order."""
    deep_faults: tuple[tuple[str, str], ...] = ()
    """(key, reason) of each bad sample that only decoding finds."""
    labelled: bool = True
    good: tuple[str, ...] = ("good",)
    """Keys of the samples that are fine."""

    @property
    def samples(self) -> int:
        """Number of samples, bad ones included."""
        return len(self.faults) + len(self.deep_faults) + len(self.good)


def _with_good(*members: tuple[str, bytes] | tarfile.TarInfo, labelled: bool = True) -> bytes:
    return tar_bytes([*sample("good", 9, labelled=labelled), *members])


def _label_case(label: bytes, reason: str) -> BadShard:
    return BadShard(_with_good(("bad.jpg", jpeg(1)), ("bad.png", label)), (), (("bad", reason),))


def bad_shards() -> dict[str, BadShard]:
    """One shard for each kind of fault, by its name."""
    one, label = jpeg(1), label_png(1)
    values = draw_shapes(1)[1]
    last = _with_good(*sample("bad", 1))
    body_end = len(last) - last[::-1].index(b"IEND"[::-1])  # of the last label map
    return {
        "cut in a label": BadShard(last[: body_end - 100], (("bad", "truncated"),)),
        "cut before a label": BadShard(
            tar_bytes([*sample("good", 9), ("bad.jpg", one)], end=False), (("bad", "truncated"),)
        ),
        "empty image": BadShard(_with_good(("bad.jpg", b""), ("bad.png", label)), (("bad", "empty"),)),
        "empty label": BadShard(_with_good(("bad.jpg", one), ("bad.png", b"")), (("bad", "empty"),)),
        "no image": BadShard(_with_good(("bad.json", b"{}"), ("bad.png", label)), (("bad", "no_image"),)),
        "no label": BadShard(_with_good(("bad.jpg", one), ("bad.txt", b"x")), (("bad", "no_label"),)),
        "pickled label": BadShard(_with_good(("bad.jpg", one), ("bad.pyd", _PICKLE)), (("bad", "pickled"),)),
        "pickled image": BadShard(
            _with_good(("bad.image.pkl", _PICKLE), labelled=False), (("bad", "pickled"),), labelled=False
        ),
        "same key later": BadShard(
            tar_bytes([*sample("twice", 1), *sample("good", 2), *sample("twice", 3)]),
            (("twice", "duplicate_key"),),
            good=("twice", "good"),
        ),
        "same member twice": BadShard(_with_good(*sample("bad", 1), ("bad.jpg", one)), (("bad", "duplicate_key"),)),
        "interleaved": BadShard(
            tar_bytes([("a.jpg", one), ("b.jpg", one), ("a.png", label), ("b.png", label), *sample("good", 2)]),
            tuple((key, "interleaved_keys") for key in "abab"),
        ),
        "symbolic link": BadShard(
            _with_good(special("bad.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("bad.png", label)),
            (("bad", "unsafe_name"),),
        ),
        "hard link": BadShard(
            _with_good(("bad.jpg", one), special("bad.png", tarfile.LNKTYPE, "good.png")), (("bad", "unsafe_name"),)
        ),
        "device": BadShard(_with_good(special("bad.jpg", tarfile.CHRTYPE)), (("bad", "unsafe_name"),)),
        "pipe": BadShard(_with_good(special("bad.jpg", tarfile.FIFOTYPE)), (("bad", "unsafe_name"),)),
        "absolute name": BadShard(_with_good(*sample("/bad", 1)), (("/bad", "unsafe_name"),)),
        "name that climbs": BadShard(_with_good(*sample("a/../../bad", 1)), (("a/../../bad", "unsafe_name"),)),
        "rubbish for an image": BadShard(
            _with_good(("bad.jpg", b"rubbish" * 99), ("bad.png", label)), (), (("bad", "not_an_image"),)
        ),
        "half an image": BadShard(
            _with_good(("bad.jpg", one[: len(one) // 2]), ("bad.png", label)), (), (("bad", "not_an_image"),)
        ),
        "a GIF": BadShard(
            _with_good(("bad.jpg", encode(values, "GIF")), ("bad.png", label)), (), (("bad", "not_an_image"),)
        ),
        "a bomb": BadShard(
            _with_good(("bad.jpg", png_header(60_000, 60_000)), ("bad.png", label)), (), (("bad", "too_large"),)
        ),
        "a colour label": _label_case(encode(draw_shapes(1)[0], "PNG"), "not_a_label"),
        "a JPEG for a label": _label_case(encode(values, "JPEG"), "not_a_label"),
        "half a label": _label_case(label[: len(label) // 2], "not_a_label"),
        "a label of another size": _label_case(encode(values[:-1], "PNG"), "label_size"),
        "a label of no class": _label_case(
            encode(np.where(values == 2, 7, values).astype(np.uint8), "PNG"), "label_value"
        ),
    }


def png_header(height: int, width: int) -> bytes:
    """A small PNG whose header claims this size."""
    data = bytearray(encode(np.zeros((1, 1), np.uint8), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


# pickle.dumps of an object whose unpickling raises ZeroDivisionError: eval("1/0").
_PICKLE = b"cbuiltins\neval\n(V1/0\ntR."


def not_tars() -> dict[str, bytes]:
    """Files that are no tar at all."""
    return {
        "empty": b"",
        "short": b"\x1f",
        "web page": b"<html>404</html>",
        "gzip": gzip.compress(np.random.default_rng(0).bytes(2000)),
        "random": np.random.default_rng(0).bytes(4000),
        "header cut": whole(1)[:300],
        "first header damaged": b"\x07" + whole(1)[1:],
    }
