"""Samples that are chosen by their metadata: the right ones, read once, from here and from elsewhere."""

import json
import os

import numpy as np
import pytest

from maskmatch_scale.data.faults import BadSample, DataError, NotFetched
from maskmatch_scale.data.remote import store_process
from maskmatch_scale.data.shards import selection
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.shards.selection import chosen_numbers
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.recipe.where import Where
from tests.data import bad_shards, foreign_shards
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.s3_server import SIGNED, Bucket

COUNTS = (3, 5, 4)
WIDTHS = {number: 100 + number * 50 for number in range(80)}
WIDE = [number for number in range(sum(COUNTS)) if WIDTHS[number] >= 400]


def write(folder, counts=COUNTS):
    """An archive of img2dataset's whose samples have widths; the third one has none, the fourth no `.json`."""
    foreign_shards.img2dataset(folder, counts)
    first = 0
    for shard, count in enumerate(counts):
        members = []
        for number in range(first, first + count):
            metadata = {"key": f"{number:09d}", "width": None if number == 2 else WIDTHS[number]}
            members.append((f"{number:09d}.jpg", bad_shards.jpeg(number)))
            members += [(f"{number:09d}.json", json.dumps(metadata).encode())] if number != 3 else []
        (folder / f"{shard:05d}.tar").write_bytes(bad_shards.tar_bytes(members))
        first += count
    return folder


def choose(root, cache, where="width >= 400", strict=False, **data):
    stream = ShardStream(
        str(root), "unlabelled", DataRecipe(root=str(root), cache_dir=str(cache), **data), strict=strict
    )
    return chosen_numbers(stream, Where(where), "theirs", cache, 60.0)


def test_read_once_and_then_from_the_file(tmp_path, monkeypatch):
    root, cache = write(tmp_path / "a"), tmp_path / "cache"
    numbers, without = choose(root, cache)
    assert numbers.tolist() == WIDE
    assert numbers.dtype == np.int64
    assert without == ", 1 left out for a field that is missing or of another type, 1 left out without metadata"
    with monkeypatch.context() as patched:
        patched.setattr(selection, "read_metadata", None)
        again, said = choose(root, cache, "(width>=400)")
        assert (again.tolist(), said) == (WIDE, without)
        with pytest.raises(TypeError):
            choose(root, cache, "width >= 401")
    # Another folder of such shards, and shards that were written again, are read.
    other = write(tmp_path / "b", (5, 3, 4))
    assert choose(other, cache)[0].tolist() == WIDE
    shard = root / "00001.tar"
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    shard.write_bytes(shard.read_bytes().replace(b'"width": 450', b'"width": 200'))
    os.utime(shard, ns=times)  # as tools that copy do
    assert choose(root, cache)[0].tolist() == [number for number in WIDE if WIDTHS[number] != 450]


@pytest.mark.parametrize("between_saves", [-1.0, 60.0])
def test_an_interrupted_start_goes_on_where_it_was(tmp_path, monkeypatch, between_saves):
    root, cache = write(tmp_path / "a", (2,) * 40), tmp_path / "cache"
    (root / "00001.tar").write_bytes(b"<html>" * 3000)
    whole = choose(root, tmp_path / "other")
    monkeypatch.setattr(selection, "_SECONDS_BETWEEN_SAVES", between_saves)
    monkeypatch.setattr(selection, "_THREADS", 1)
    read, looked = selection.read_metadata, []

    def interrupted(file, shard):
        looked.append(shard)
        if len(looked) == 25:
            raise KeyboardInterrupt
        return read(file, shard)

    with monkeypatch.context() as patched:
        patched.setattr(selection, "read_metadata", interrupted)
        with pytest.raises(KeyboardInterrupt):
            choose(root, cache)
    before, looked[:] = set(looked), []
    with monkeypatch.context() as patched:
        patched.setattr(selection, "read_metadata", lambda file, shard: looked.append(shard) or read(file, shard))
        numbers, said = choose(root, cache)
    assert (numbers.tolist(), said) == (whole[0].tolist(), whole[1])
    assert len(looked) == 40 - 24
    assert before | set(looked) == {str(file) for file in root.glob("*.tar")}


def test_from_a_server(tmp_path):
    root, cache = write(tmp_path / "a"), tmp_path / "cache"
    lines = [f"{shard:05d}.tar {count}" for shard, count in enumerate(COUNTS)]
    (root / "list.txt").write_text("\n".join(lines))
    with FaultyServer(root, {"00001.tar": [Fault(times=1, status=503)]}) as server:
        address = f"{server.url}/list.txt"
        assert choose(address, cache, fetch_timeout_s=1.0)[0].tolist() == WIDE
        asked = len(server.requests)
        assert choose(address, cache)[0].tolist() == WIDE
        assert len(server.requests) <= asked + 1  # the list
        # One that cannot be fetched now may come on other machines: they would choose other samples.
        server.set_faults({"00002.tar": Fault(status=503)})
        with pytest.raises(NotFetched, match=r"00002\.tar"):
            choose(address, tmp_path / "other", fetch_attempts=1)


def test_from_an_object_store(tmp_path, s3_server, monkeypatch):
    store_process.end_all()  # those of other tests have another environment
    for name, value in {**SIGNED, "AWS_ENDPOINT_URL": f"http://{s3_server}"}.items():
        monkeypatch.setenv(name, value)
    root, bucket = write(tmp_path / "a"), Bucket(s3_server, "selection").make()
    bucket.put("list.txt", "\n".join(f"{shard:05d}.tar {count}" for shard, count in enumerate(COUNTS)).encode())
    for shard in root.glob("*.tar"):
        bucket.put(shard.name, shard.read_bytes())
    assert choose("s3://selection/list.txt", tmp_path / "cache")[0].tolist() == WIDE
    assert not store_process._all  # each of the threads had one
    assert len(list((tmp_path / "cache").glob("url-*"))) == len(COUNTS)


def test_a_shard_that_cannot_be_read(tmp_path, caplog):
    root, cache = write(tmp_path / "a"), tmp_path / "cache"
    (root / "00001.tar").write_bytes(b"<html>" * 3000)
    numbers, without = choose(root, cache)
    assert numbers.tolist() == [number for number in WIDE if number >= 8]
    assert without.endswith(", 1 shards left out that cannot be read")
    assert caplog.text.count("`where` leaves out a whole shard: ") == 1
    with pytest.raises(BadSample, match="not a tar"):
        choose(root, tmp_path / "other", strict=True)
    write(root)
    assert choose(root, cache)[0].tolist() == WIDE


def test_more_samples_than_the_index_says_are_not_chosen(tmp_path):
    root = write(tmp_path / "a")
    foreign_shards.note(root / "00002.tar", 2)
    assert choose(root, tmp_path / "cache")[0].tolist() == [number for number in WIDE if number < 10]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "widht > 3",
            r"source 'theirs': where 'widht > 3': none of 12 samples has a field 'widht'; there are key, width",
        ),
        ("width > 9000", "source 'theirs': .* is like that .1 of them lack a field"),
    ],
)
def test_conditions_that_choose_nothing(tmp_path, monkeypatch, where, message):
    root, cache = write(tmp_path / "a"), tmp_path / "cache"
    with pytest.raises(DataError, match=message):
        choose(root, cache, where)
    monkeypatch.setattr(selection, "read_metadata", None)
    with pytest.raises(DataError, match=message):  # for the other ranks nothing is read again
        choose(root, cache, where)


def test_if_it_takes_too_long_it_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(selection, "_SECONDS_BEFORE_AN_ESTIMATE", -1.0)
    root = write(tmp_path / "a")
    stream = ShardStream(str(root), "unlabelled", DataRecipe(root=str(root)), strict=False)
    chosen_numbers(stream, Where("width >= 400"), "theirs", tmp_path / "cache", 0.0)
    assert caplog.text.count("raise engine.collective_timeout_s") == 1
