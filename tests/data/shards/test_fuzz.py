"""Thousands of damaged shards: whatever the bytes are, only BadSample comes out, soon, and without much memory."""

import io
import random
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from maskmatch_scale.data.faults import REASONS, BadSample
from maskmatch_scale.data.images.decode import decode_image, decode_label
from maskmatch_scale.data.shards.tar import read_table
from tests.data.bad_shards import (
    CLASSES,
    FORMATS,
    bad_shards,
    checksummed,
    encode,
    jpeg,
    label_png,
    sample,
    special,
    tar_bytes,
)

SECONDS_A_CASE = 10
MEMORY_BYTES = 1 << 30
"""Address space beyond what the process has already: a decoder that believes a header runs into it."""
MAX_PIXELS = 1_000_000


def seeds():
    """Small shards of every kind: (bytes, labelled)."""
    picture = Image.open(io.BytesIO(jpeg(3)))
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "webp": encode(picture, "WEBP"),
        "png": encode(picture.quantize(20), "PNG", transparency=bytes(range(20))),
        "jpeg": encode(picture, "JPEG", progressive=True, exif=exif),
        "jpg": encode(picture.convert("CMYK"), "JPEG"),
    }
    unlabelled = [(f"{extension}-image.{extension}", data) for extension, data in images.items()]
    pair = (("webp", images["webp"]), ("png", label_png(3)))
    long_names = [("x" * 90 + f"/ü{'y' * 90}{n}.{extension}", data) for n in range(2) for extension, data in pair]
    odd = [special("folder", b"5"), special("link.jpg", b"2", "a"), *sample("a"), ("a.json", b"{}"), *sample("b", 1)]
    return [
        *((tar_bytes(long_names, tar_format), True) for tar_format in FORMATS.values()),
        (tar_bytes(unlabelled), False),
        (tar_bytes(odd), True),
        (tar_bytes(odd, FORMATS["pax"]), False),
        *((case.data, case.labelled) for case in bad_shards().values()),
    ]


def flip_bits(data, draw):
    for _ in range(draw.choice((1, 3, 20))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def damage_header(data, draw):
    """Change a field of a header and mend its checksum, so that it is believed."""
    at = draw.choice(headers(data))
    start, length = draw.choice(((0, 100), (124, 12), (156, 1), (157, 100), (345, 155), (0, 512)))
    if start == 124:
        sizes = b"77777777777", b"\x80" + draw.randbytes(11), b"\xff" * 12, b"-1", b"%011o" % draw.randrange(9**6)
        new = draw.choice(sizes).ljust(12, b"\0")
    elif start == 156:
        new = bytes([draw.choice((*b"0123456789LKxgXSDMNVQ", 0, draw.randrange(256)))])
    elif start == 0 and length == 100:
        names = b"../../a.jpg", b"/a.png", b"\xff\xfe.jpg", b"a.jpg", b"a.pkl", b"", b"a." * 50, draw.randbytes(100)
        new = draw.choice(names).ljust(100, b"\0")
    else:
        new = draw.randbytes(length)
    data[at + start : at + start + length] = new
    data[at : at + 512] = checksummed(data[at : at + 512])


def damage_body(data, draw):
    """Random bytes in one place, often near the start of a body, where formats keep their sizes."""
    at = draw.choice(headers(data)) + 512 + draw.randrange(100) if draw.random() < 0.7 else draw.randrange(len(data))
    new = draw.choice((draw.randbytes(draw.randrange(1, 30)), b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
    data[at : at + len(new)] = new


def cut(data, draw):
    del data[draw.randrange(len(data)) :]


def move_blocks(data, draw):
    """Repeat, remove or swap blocks of 512 bytes, or splice in some of another place."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    a, b = sorted(draw.randrange(len(blocks)) for _ in range(2))
    b = min(b, a + 20)
    kind = draw.randrange(4)
    if kind == 0:
        blocks[a:a] = blocks[a : b + 1] * draw.choice((1, 5))
    elif kind == 1:
        del blocks[a : b + 1]
    elif kind == 2:
        blocks[a], blocks[b] = blocks[b], blocks[a]
    else:
        piece = blocks[a : b + 1]
        at = draw.randrange(len(blocks))
        blocks[at : at + len(piece)] = piece
    data[:] = b"".join(blocks)


def insert_or_drop_bytes(data, draw):
    at = draw.randrange(len(data))
    if draw.random() < 0.5:
        data[at:at] = draw.randbytes(draw.randrange(1, 600))
    else:
        del data[at : at + draw.randrange(1, 600)]


def random_bytes(data, draw):
    data[:] = draw.randbytes(draw.randrange(3000))


MUTATIONS = (flip_bits, damage_header, damage_header, damage_body, damage_body, cut, move_blocks, insert_or_drop_bytes)


def headers(data):
    """Where headers are, by their magic."""
    return [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"] or [0]


def mutated(number, shards):
    draw = random.Random(number)
    data, labelled = draw.choice(shards)
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        mutation = draw.choice(MUTATIONS) if draw.random() < 0.98 else random_bytes
        if len(data) >= 512 or mutation is random_bytes:
            mutation(data, draw)
    return bytes(data), labelled if draw.random() < 0.9 else not labelled


def read_everything(data, labelled):
    """Reasons for which samples were refused, None for each that was read."""
    file = io.BytesIO(data)
    try:
        table = read_table(file, "s.tar", labelled=labelled)
    except BadSample as bad:
        return [bad.reason]
    said = {place: fault.reason for place, _, fault in table.faults()}
    reasons: list[str | None] = []
    messages = []
    for place in range(len(table)):
        try:
            image, label = table.read(file, place)
            assert place not in said
            pixels = decode_image(image, table.key(place), max_pixels=MAX_PIXELS, exif_orientation=not labelled)
            assert pixels.ndim == 3
            assert pixels.shape[0] == 3
            if label is not None:
                size = (pixels.shape[1], pixels.shape[2])
                values = decode_label(label, table.key(place), num_classes=CLASSES, size=size, max_pixels=MAX_PIXELS)
                assert values.shape == size
                assert set(values.unique().tolist()) <= {*range(CLASSES), 255}
            reasons.append(None)
        except BadSample as bad:
            reasons.append(bad.reason)
            messages.append(str(bad))
    assert not [message for message in messages if "\n" in message or "MemoryError" in message]
    return reasons


@contextmanager
def bounded():
    """Little memory, and a handler for the alarm of a case that hangs."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))

    def too_long(*_):
        raise KeyboardInterrupt(f"a case took {SECONDS_A_CASE} s")

    handler = signal.signal(signal.SIGALRM, too_long)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(numbers):
    shards = seeds()
    for data, labelled in shards:
        read = read_everything(data, labelled)
        assert None in read
    seen = dict.fromkeys([None, *REASONS], 0)
    slowest = 0.0
    with bounded():
        for number in numbers:
            data, labelled = mutated(number, shards)
            signal.alarm(SECONDS_A_CASE)
            began = time.perf_counter()
            try:
                for reason in read_everything(data, labelled):
                    seen[reason] += 1
            except BaseException as error:
                raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
            slowest = max(slowest, time.perf_counter() - began)
    print(f"{len(numbers)} shards, slowest {slowest:.2f} s, samples: {seen}")  # noqa: T201
    return seen


def test_some_damaged_shards():
    seen = fuzz(range(300))
    assert seen[None] > 100
    assert {"truncated", "shard_unreadable", "not_an_image", "no_image", "no_label"} <= {
        r for r, n in seen.items() if n
    }


@pytest.mark.slow
def test_ten_thousand_damaged_shards():
    seen = fuzz(range(10_000))
    # What cannot be reached is no fault of a shard.
    assert all(seen[reason] for reason in REASONS if reason != "unreachable"), seen
