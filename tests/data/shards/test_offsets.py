"""A sample by its bytes alone is the sample of the whole shard, whoever wrote it, or is not given at all."""

import hashlib
import io
import random
import shutil
import struct
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.shards.offsets import (
    Offsets,
    energon_offsets,
    energon_side_car,
    find_offsets,
    is_side_car_of,
    packed,
    side_car,
    unpacked,
)
from maskmatch_scale.data.shards.tar import read_table
from tests.data.bad_shards import bad_shards, not_tars, sample, special, tar_bytes
from tests.data.shards.test_fuzz import flip_bits, mutated, seeds
from tests.data.shards.test_writers import SAMPLES, WRITERS

SHA = hashlib.sha256(b"x").hexdigest()


def whole_shard(data, labelled):
    """Each sample as the whole shard has it; None for a bad one."""
    with io.BytesIO(data) as file:
        table = read_table(file, "s.tar", labelled=labelled)
        found = []
        for place in range(len(table)):
            try:
                found.append((table.key(place), *table.read(file, place)))
            except BadSample:
                found.append(None)
    return found


def by_ranges(data, offsets, labelled):
    spans = [offsets.span(place) for place in range(len(offsets))]
    return [
        offsets.sample(place, data[start:stop], "s.tar", labelled=labelled) for place, (start, stop) in enumerate(spans)
    ]


def found_in(data, labelled):
    return find_offsets(io.BytesIO(data), "s.tar", labelled=labelled)


@pytest.mark.parametrize("writer", WRITERS)
@given(samples=SAMPLES)
@settings(max_examples=15, deadline=None)
def test_of_every_writer(writer, samples):
    if writer == "bsdtar" and not shutil.which("bsdtar"):
        pytest.skip("bsdtar is not installed")
    with tempfile.TemporaryDirectory() as name:
        for path in WRITERS[writer](samples, Path(name)):
            data = path.read_bytes()
            offsets = found_in(data, labelled=False)
            assert by_ranges(data, offsets, False) == whole_shard(data, False)
            assert offsets.starts[0] == 0 or writer != "TarWriter"
            plain = energon_offsets(offsets.starts.astype("<u8").tobytes(), len(offsets), len(data))
            assert by_ranges(data, plain, False) == whole_shard(data, False)


def test_headers_before_a_member_and_what_is_no_sample_belong_to_ranges():
    """Long names and pax headers come first; a folder and a note about the shard lie between samples."""
    members = [special("folder", b"5"), ("__meta__/x.json", b"{}"), *sample("a" * 200), ("README", b"?"), *sample("b")]
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = tar_bytes(members, tar_format)
        offsets = found_in(data, True)
        assert by_ranges(data, offsets, True) == whole_shard(data, True)
        assert len(offsets) == 2
        assert data[offsets.starts[0] + 156 : offsets.starts[0] + 157] in (b"L", b"x")
        assert offsets.starts[-1] == len(data.rstrip(b"\0")) // 512 * 512 + 512


@pytest.mark.parametrize("name", bad_shards())
def test_a_shard_with_a_fault_in_its_headers_has_none(name):
    case = bad_shards()[name]
    with io.BytesIO(case.data) as file:
        table = read_table(file, "s.tar", labelled=case.labelled)
        is_sound = not table.truncated and not list(table.faults())
    offsets = found_in(case.data, case.labelled)
    assert (offsets is not None) == is_sound


def test_keys_that_come_twice_are_seen_in_the_whole_shard_alone():
    """Each of them is a sound sample by its bytes: so such a shard must have no offsets."""
    assert found_in(tar_bytes([*sample("a"), *sample("b"), *sample("a", 1)]), True) is None
    assert found_in(tar_bytes([*sample("a"), *sample("b"), *sample("c", 1)]), True) is not None


@pytest.mark.parametrize("name", not_tars())
def test_what_is_no_tar(name):
    with pytest.raises(BadSample):
        found_in(not_tars()[name], False)


def test_damaged_shards():
    """What was damaged before the offsets were made, and since."""
    shards = seeds()
    sound = [(data, labelled, found_in(data, labelled)) for data, labelled in shards]
    given_by_ranges = 0
    for number in range(600):
        data, labelled = mutated(number, shards)
        try:
            offsets = found_in(data, labelled)
        except BadSample:
            offsets = None
        if offsets is not None:
            assert by_ranges(data, offsets, labelled) == whole_shard(data, labelled)
            given_by_ranges += 1
    assert given_by_ranges > 50
    for number in range(200):
        draw = random.Random(number)
        before, labelled, offsets = draw.choice([case for case in sound if case[2] is not None])
        data = bytearray(before)
        flip_bits(data, draw)
        for now, then in zip(by_ranges(bytes(data), offsets, labelled), whole_shard(before, labelled), strict=True):
            assert now in (None, then)


def test_bytes_of_another_place_are_not_a_sample():
    data = tar_bytes([*sample("a"), *sample("b", 1)])
    starts = found_in(data, True).starts
    for wrong in ([0, starts[2]], [512, starts[1]], [0, starts[1] - 512], [0, starts[1] + 512]):
        one = Offsets(np.array(wrong))
        assert one.sample(0, data[wrong[0] : wrong[1]], "s.tar", labelled=True) is None
    one = Offsets(starts)
    assert one.sample(0, data[: starts[1] - 1], "s.tar", labelled=True) is None
    assert one.sample(0, data[: starts[1]], "s.tar", labelled=True)[0] == "a"


def test_a_side_car_is_of_one_shard_and_whole(tmp_path):
    data = tar_bytes([*sample("a"), *sample("b", 1)])
    offsets = found_in(data, True)
    car = packed(offsets, len(data), SHA)
    read = unpacked(car, 2, len(data), SHA)
    assert (read.starts == offsets.starts).all()
    assert (read.checksums == offsets.checksums).all()
    assert unpacked(car, 2, None, None) is not None
    assert unpacked(car, 3, len(data), SHA) is None
    assert unpacked(car, 2, len(data) + 512, SHA) is None
    assert unpacked(car, 2, len(data), hashlib.sha256(b"y").hexdigest()) is None
    for wrong in (car[:-1], car + b"\0", b"", b"<html>", bytes([car[0] ^ 1]) + car[1:], car[:70] + b"?" + car[71:]):
        assert unpacked(wrong, 2, len(data), SHA) is None
    (tmp_path / "car").write_bytes(car)
    assert is_side_car_of(tmp_path / "car", SHA)
    assert not is_side_car_of(tmp_path / "car", hashlib.sha256(b"y").hexdigest())
    assert not is_side_car_of(tmp_path / "none", SHA)


def test_a_side_car_may_say_that_there_are_none():
    assert unpacked(packed(None, 5, SHA), 2, 5, SHA) is None


@pytest.mark.parametrize(
    "words", [(0, 1024), (0, 1024, 1024), (1024, 0, 2048), (0, 1000, 2048), (0, 1 << 63, 1 << 63), (0, 512, 4096)]
)
def test_offsets_of_others_that_cannot_be(words):
    assert energon_offsets(struct.pack(f"<{len(words)}Q", *words), 2, 2048) is None


def test_offsets_of_others():
    assert energon_offsets(struct.pack("<3Q", 512, 1024, 2048), 2, 2048).span(1) == (1024, 2048)
    assert energon_offsets(struct.pack("<3Q", 512, 1024, 2048), 2, None) is not None


def test_names():
    assert side_car("a.tar") == "offsets/a.tar.offsets"
    secret, other = (side_car(f"https://u:p@host/a.tar?sig={n}") for n in (1, 2))
    assert secret == other != side_car("https://host/b.tar")
    assert "/" not in side_car("/data/x/a.tar").removeprefix("offsets/")
    assert energon_side_car("/data/a.tar") == "/data/a.tar.idx"
    assert energon_side_car("https://host/a.tar?sig=1") == "https://host/a.tar.idx?sig=1"
    assert energon_side_car("s3://bucket/a") is None
