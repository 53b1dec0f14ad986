"""Tables as files: what they give is what the headers give, they are made once, and none that is stale is trusted."""

import contextlib
import errno
import io
import multiprocessing
import os
import pickle
import shutil
import time

import numpy as np
import pytest

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote.cache_folder import CacheFolder
from maskmatch_scale.data.remote.shard_cache import ShardCache, cached_name
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards import tables
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.shards.tables import TableFiles, packed, unpacked
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.recipe import DataRecipe
from tests.data.bad_shards import bad_shards, sample, tar_bytes, whole
from tests.data.faulty_server import FaultyServer
from tests.data.foreign_shards import write_tar
from tests.data.shards.test_fuzz import mutated, seeds

IDENTITY = bytes(range(32))


@pytest.fixture
def options(tmp_path):
    return FetchOptions(tmp_path / "cache", limit_bytes=10_000_000, timeout_s=5, attempts=2)


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Shards that were written just now are taken for old ones."""
    monkeypatch.setattr(tables, "_SETTLED_S", 0.0)


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "a.tar", 20)


@pytest.fixture
def scans(monkeypatch):
    """Names of shards whose headers were read."""
    found = []
    monkeypatch.setattr(tables, "read_table", lambda file, name, **k: found.append(name) or read_table(file, name, **k))
    return found


def of(table):
    told = [(place, key, fault.reason, str(fault)) for place, key, fault in table.faults()]
    spans, *_ = table.parts()
    keys = [table.key(place) for place in range(len(table))]
    return spans.tolist(), keys, told, table.damage, table.truncated, table.shard, table.labelled


def read(options, path, *, labelled=False, cached=None):
    with io.FileIO(path) as file:
        return TableFiles(options, labelled=labelled).read(file, str(path), cached)


def test_of_all_kinds_of_shards():
    cases = [(case.data, case.labelled) for case in bad_shards().values()]
    shards = seeds()
    cases += [mutated(number, shards) for number in range(200)]
    compared = 0
    for data, labelled in cases:
        with contextlib.suppress(BadSample):
            table = read_table(io.BytesIO(data), "s.tar", labelled=labelled)
            assert of(unpacked(packed(table, IDENTITY), IDENTITY, "s.tar", labelled=labelled)) == of(table)
            compared += 1
    assert compared > 100


def test_samples_are_read_by_a_table_of_a_file():
    data = whole(3)
    table = read_table(io.BytesIO(data), "s.tar", labelled=True)
    again = pickle.loads(pickle.dumps(unpacked(packed(table, IDENTITY), IDENTITY, "s.tar", labelled=True)))
    for place in range(3):
        assert again.read(io.BytesIO(data), place) == table.read(io.BytesIO(data), place)


def test_damage_anywhere_is_found():
    content = packed(read_table(io.BytesIO(whole(2)), "s.tar", labelled=True), IDENTITY)
    assert unpacked(content, IDENTITY, "s.tar", labelled=True) is not None
    for at in range(len(content)):
        bad = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        assert unpacked(bad, IDENTITY, "s.tar", labelled=True) is None
        assert unpacked(content[:at], IDENTITY, "s.tar", labelled=True) is None
    assert unpacked(content + b"\0", IDENTITY, "s.tar", labelled=True) is None
    assert unpacked(content, bytes(32), "s.tar", labelled=True) is None


def test_a_local_shard_is_scanned_once(options, shard, scans):
    first = read(options, shard)
    assert of(read(options, shard)) == of(first)
    assert scans == [str(shard)]
    read(options, shard, labelled=True)  # which is another table
    assert len(scans) == 2


def changed(path):
    data = bytearray(path.read_bytes())
    at = data.index(b"000000003.jpg")
    data[at : at + 9] = b"000000099"
    return data


CHANGES = {
    "size": lambda path: path.write_bytes(tar_bytes(sample("a", labelled=False))),
    "time": lambda path: os.utime(path, (1e9, 1e9)),
    "bytes in place": lambda path: path.write_bytes(changed(path)),
    "inode": lambda path: shutil.copy2(path, path.with_suffix(".new")).replace(path),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_local_shard_that_was_changed_is_scanned_again(options, shard, scans, what):
    read(options, shard)
    times = shard.stat()
    CHANGES[what](shard)
    if what != "time":  # as copies have that keep times
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert of(read(options, shard)) == of(read_table(io.BytesIO(shard.read_bytes()), str(shard), labelled=False))
    assert len(scans) == 2


@pytest.mark.parametrize("is_set_back", [False, True])
def test_a_shard_that_is_being_written_has_no_file(options, shard, scans, monkeypatch, is_set_back):
    monkeypatch.setattr(tables, "_SETTLED_S", 100.0)
    if is_set_back:
        os.utime(shard, (1e9, 1e9))
    for _ in range(2):
        read(options, shard)
    assert len(scans) == 2
    assert not (options.cache / "tables").exists()


@pytest.mark.parametrize("damage", [b"", b"?", b"\0" * 100])
def test_a_file_that_is_damaged_is_made_again(options, shard, scans, damage):
    expected = of(read(options, shard))
    (file,) = (options.cache / "tables").glob("sha256-*")
    good = file.read_bytes()
    file.write_bytes(damage if len(damage) != 1 else good[:-1] + damage)
    assert of(read(options, shard)) == expected
    assert file.read_bytes() == good
    assert len(scans) == 2


@pytest.mark.parametrize("cached", [True, False])
def test_eight_processes_scan_a_shard_once(options, shard, tmp_path, monkeypatch, cached):
    """Those that come at the same time wait for the one that scans."""
    name = None
    if cached:
        options.cache.mkdir()
        name = "sha256-" + "0" * 64
        shutil.copy2(shard, options.cache / name)
    counted = tmp_path / "counted"

    def slowly(file, shard_name, **k):
        with counted.open("a") as out:
            out.write("x")
        time.sleep(0.3)
        return read_table(file, shard_name, **k)

    monkeypatch.setattr(tables, "read_table", slowly)
    path = options.cache / name if cached else shard
    expected = of(read_table(io.BytesIO(shard.read_bytes()), str(path), labelled=False))

    def work():
        assert of(read(options, path, cached=name)) == expected

    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert counted.read_text() == "x"
    assert not [
        path for path in options.cache.rglob("*") if path.name.endswith((".lock", ".part")) and "room" not in path.name
    ]


def remote(server, tmp_path, root="", **more):
    return ShardStream(
        server.url + root, "unlabelled", DataRecipe(root=server.url, cache_dir=str(tmp_path / "cache"), **more)
    )


def test_a_fetched_shard_has_its_table_beside_it(shapes, tmp_path, scans):
    with FaultyServer(shapes) as server:
        for _ in range(2):
            stream = remote(server, tmp_path)
            for number in range(3):
                assert stream[number] == ShardStream(shapes, "unlabelled")[number]
    elsewhere = [name for name in scans if name.startswith("http")]
    assert len(elsewhere) == len(set(elsewhere)) > 0
    besides = sorted((tmp_path / "cache").glob(".*.table"))
    assert len(besides) == len(elsewhere)
    owners = {path.name[1:].partition(".")[0] for path in besides}
    assert all((tmp_path / "cache" / owner).exists() for owner in owners)


def test_it_is_dropped_with_its_shard(options, shard):
    """And both count: the folder has never more bytes than its limit."""
    size = shard.stat().st_size
    limit = 3 * size + 30_000
    served = shard.parent / "served"
    served.mkdir()
    for number in range(8):
        shutil.copy(shard, served / f"{number}.tar")
        (served / f"{number}.tar").write_bytes(shard.read_bytes() + bytes(512 * number))
    options = FetchOptions(options.cache, limit, 5, 2)
    with FaultyServer(served) as server:
        cache, files = ShardCache(options), TableFiles(options, labelled=False)
        for number in range(8):
            url = f"{server.url}/{number}.tar"
            with cache.open(url, size + 512 * number) as file:
                files.read(file, url, cached_name(url, None, None))
            names = {path.name: path.stat().st_size for path in options.cache.iterdir()}
            assert sum(names.values()) <= limit
            assert f".{cached_name(url, None, None)}.unlabelled.table" in names
            owners = {name[1:].partition(".")[0] for name in names if name.endswith(".table")}
            assert owners <= names.keys()
    assert 2 <= len(owners) <= 3


def test_a_shard_that_takes_the_place_of_another_one(options, tmp_path, scans):
    """With the same size, and perhaps the same inode, where somebody has emptied the cache but for hidden files."""
    served = tmp_path / "served"
    shard = write_tar(served / "a.tar", 5)
    other = changed(shard)
    with FaultyServer(served) as server:
        url = f"{server.url}/a.tar"
        name = cached_name(url, None, None)
        for data in (None, other):
            if data is not None:
                (options.cache / name).unlink()
                shard.write_bytes(data)
            with ShardCache(options).open(url) as file:
                table = TableFiles(options, labelled=False).read(file, url, name)
            assert of(table) == of(read_table(io.BytesIO(shard.read_bytes()), url, labelled=False))
    assert len(scans) == 2


def test_a_disk_without_attributes_tells_no_versions_apart(options, tmp_path, scans, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(os, "getxattr", none)
    path = write_tar(tmp_path / "x.tar", 3)
    for _ in range(2):
        read(options, path, cached="url-" + "0" * 64)
    assert len(scans) == 2


@pytest.mark.parametrize("how", ["a file in its place", "read-only"])
def test_a_folder_that_cannot_be_written_to(options, shard, scans, how):
    if how == "a file in its place":
        options.cache.write_text("")
    else:
        options.cache.mkdir()
        (options.cache / "tables").mkdir()
        options.cache.chmod(0o500)
        (options.cache / "tables").chmod(0o500)
        if os.access(options.cache / "tables", os.W_OK):
            pytest.skip("root writes to read-only folders")
    files = TableFiles(options, labelled=False)
    for _ in range(2):
        with io.FileIO(shard) as file:
            assert len(files.read(file, str(shard), None)) == 20
    assert len(scans) == 2


def test_a_shard_that_is_no_tar(options, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"<html>" * 200)
    for _ in range(2):
        with pytest.raises(BadSample, match="web page"):
            read(options, path)
    assert not list(options.cache.rglob("sha256-*"))


def test_files_of_local_shards_are_pruned(options, shard, monkeypatch):
    monkeypatch.setattr(tables, "_MOST_LOCAL", 10)
    monkeypatch.setattr(tables, "_PRUNED_EVERY", 1)
    for number in range(30):
        path = shard.with_name(f"{number}.tar")
        shutil.copy2(shard, path)
        read(options, path)
        assert len(list((options.cache / "tables").glob("sha256-*"))) <= 11
    monkeypatch.setattr(tables, "_MOST_LOCAL_BYTES", 4000)
    read(options, shard)
    assert sum(path.stat().st_size for path in (options.cache / "tables").glob("sha256-*")) <= 4000


def test_what_is_dropped_at_any_time_is_no_error(options, shard):
    """A process removes files while others read and write them."""
    stop = multiprocessing.get_context("fork").Event()

    def remove():
        while not stop.is_set():
            for path in (options.cache / "tables").glob("*"):
                path.unlink(missing_ok=True)

    process = multiprocessing.get_context("fork").Process(target=remove)
    process.start()
    try:
        for _ in range(200):
            assert len(read(options, shard)) == 20
    finally:
        stop.set()
        process.join()


def test_a_stream_takes_it(tmp_path, scans, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    from maskmatch_scale.data.writing import write_shards
    from tests.data.writing.test_write import Squares

    write_shards(Squares(), tmp_path / "x", workers=1, progress=False)
    data = DataRecipe(root=str(tmp_path / "x"), cache_dir=str(tmp_path / "cache"))
    one, other = (ShardStream(tmp_path / "x", "unlabelled", data) for _ in range(2))
    assert [one[n] for n in range(len(one))] == [other[n] for n in range(len(other))]
    assert len(scans) == len(one.shards)


def test_numbers_of_a_table_cannot_be_written_to():
    table = read_table(io.BytesIO(whole(2)), "s.tar", labelled=True)
    again = unpacked(packed(table, IDENTITY), IDENTITY, "s.tar", labelled=True)
    assert isinstance(again.parts()[0], np.ndarray)
    assert not again.parts()[0].flags.writeable


def test_room_is_not_taken_from_what_is_being_fetched(options, shard):
    name = "sha256-" + "0" * 64
    folder = CacheFolder(options.cache, shard.stat().st_size)
    shutil.copy2(shard, options.cache / name)
    with folder.begin("sha256-" + "1" * 64, shard.stat().st_size):
        with contextlib.suppress(DataError):
            folder.keep_beside(name, "unlabelled", b"x" * 100)
        assert not list(options.cache.glob("*.table"))
