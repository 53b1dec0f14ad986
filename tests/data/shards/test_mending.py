"""A shard that was damaged in the cache is found by its first bad sample, and fetched again."""

import os
from pathlib import Path

import pytest

from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.decode import decode_image
from maskmatch_scale.data.remote.cache_folder import CacheFolder
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.recipe import DataRecipe
from tests.data import foreign_shards
from tests.data.batches.common import make_batches, same
from tests.data.faulty_server import FaultyServer


@pytest.fixture
def server(shapes):
    with FaultyServer(shapes) as running:
        yield running


@pytest.fixture
def data(server, tmp_path):
    return DataRecipe(root=server.url, cache_dir=str(tmp_path / "cache"))


def decode(raw):
    return decode_image(raw.image, raw.name)


def damage(cache: Path, shard, at: int, length: int) -> None:
    """Other bytes in a cached file, in place: its size, time and inode stay. What its headers said is forgotten."""
    for table in cache.glob(".*.table"):
        table.unlink()
    path = cache / f"sha256-{shard.sha256}" if shard.sha256 else next(cache.glob("url-*"))
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        bad = bytes(255 - byte for byte in file.read(length))
        file.seek(at)
        file.write(bad)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("at", [0, 512], ids=["header", "image"])
@pytest.mark.parametrize("known", [True, False], ids=["headers known", "headers not read yet"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_damaged_shard_is_fetched_again(server, data, shapes, tmp_path, at, known, strict):
    shard = ShardIndex.load(shapes).streams["unlabelled"].shards[0]
    plain = decode(ShardStream(shapes, "unlabelled")[0])
    stream = ShardStream(server.url, "unlabelled", data, strict=strict)
    assert stream.load(0, 0, decode).equal(plain)
    damage(tmp_path / "cache", shard, at, 512)
    if not known:
        stream = ShardStream(server.url, "unlabelled", data, strict=strict)
    assert stream.load(0, 0, decode).equal(plain)
    assert all(stream.load(0, place, decode).shape[0] == 3 for place in range(shard.samples))
    assert server.gets(shard.file) == (1 if at == 0 and known else 2)  # headers that are known are not read again


def test_a_damaged_shard_without_a_checksum_is_compared_with_what_was_fetched(tmp_path):
    foreign_shards.energon(tmp_path / "served", (3, 2))
    with FaultyServer(tmp_path / "served") as server:
        data = DataRecipe(root=server.url, cache_dir=str(tmp_path / "cache"))
        stream = ShardStream(server.url, "unlabelled", data, strict=False)
        plain = stream.load(0, 1, decode)
        (cached,) = (tmp_path / "cache").glob("url-*")
        try:
            os.getxattr(cached, "user.maskmatch.sha256")
        except OSError:
            pytest.skip("this file system has no extended attributes")
        damage(tmp_path / "cache", stream.shards[0], 0, 8192)
        stream = ShardStream(server.url, "unlabelled", data, strict=False)  # its headers are not known yet
        assert stream.load(0, 1, decode).equal(plain)
        assert stream.take_figures().damaged == 1

        def refuse(raw):
            raise BadSample("not_an_image", raw.name)

        for place in (0, 1, 2):
            with pytest.raises(BadSample):
                stream.load(0, place, refuse)
        assert server.gets("shards/00000.tar") == 2  # a sample that is bad on the server is not fetched again and again
        os.removexattr(cached, "user.maskmatch.sha256")
        damage(tmp_path / "cache", stream.shards[0], 0, 8192)
        with pytest.raises(BadSample):  # nothing to compare it with
            ShardStream(server.url, "unlabelled", data, strict=False).load(0, 1, decode)


def test_another_process_has_mended_it(server, data, shapes, tmp_path):
    """This process read the headers while they were damaged; the file is good when it looks."""
    shard = ShardIndex.load(shapes).streams["unlabelled"].shards[0]
    path = tmp_path / "cache" / f"sha256-{shard.sha256}"
    stream = ShardStream(server.url, "unlabelled", data, strict=False)
    stream[shard.samples]  # makes the cache
    ShardStream(server.url, "unlabelled", data)[0]
    good = path.read_bytes()
    damage(tmp_path / "cache", shard, 0, 512)
    with pytest.raises(BadSample):
        stream.read(0, 0)
    path.write_bytes(good)
    assert stream.load(0, 0, decode).shape[0] == 3
    assert server.gets(shard.file) == 1


def test_a_file_is_compared_once_whatever_is_bad_in_it(server, data, shapes, monkeypatch):
    compared = []
    drop_if_damaged = CacheFolder.drop_if_damaged
    monkeypatch.setattr(
        CacheFolder, "drop_if_damaged", lambda *args: compared.append(args[1]) or drop_if_damaged(*args)
    )
    stream = ShardStream(server.url, "unlabelled", data)

    def refuse(raw):
        raise BadSample("not_an_image", raw.name)

    for place in [0, 1, 2, 0, 1]:
        with pytest.raises(BadSample):
            stream.load(0, place, refuse)
    shard = ShardIndex.load(shapes).streams["unlabelled"].shards[0]
    assert compared == [f"sha256-{shard.sha256}"]
    assert server.gets(shard.file) == 1


def test_batches_and_evaluations_skip_nothing(server, data, shapes, make_recipe, tmp_path):
    recipe = {"data": {"root": server.url, "cache_dir": data.cache_dir}}
    plain = [make_batches(make_recipe)[number] for number in range(12)]
    assert all(map(same, plain, map(make_batches(make_recipe, **recipe).__getitem__, range(12))))
    samples = list(evaluation_samples(data, "dev"))
    for stream in ShardIndex.load(shapes).streams.values():
        for shard in stream.shards:
            if (tmp_path / "cache" / f"sha256-{shard.sha256}").exists():
                damage(tmp_path / "cache", shard, 512, 8)  # WebP has no checksum of its pixels
    made = make_batches(make_recipe, **recipe)
    again = [made[number] for number in range(12)]
    assert all(map(same, plain, again))
    assert not any(batch.skipped for batch in again)
    assert sum(batch.fetched.damaged for batch in again) > 0
    for one, other in zip(samples, evaluation_samples(data, "dev"), strict=True):
        assert one.image.equal(other.image)


def test_bytes_are_on_the_disk_before_a_file_counts_as_whole(server, data, tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor):
        done.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def noted_replace(path, target):
        if path.suffix == ".part":
            done.append(("rename", path.stat().st_ino))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    stream = ShardStream(server.url, "unlabelled", data)
    stream[0]
    inode = (tmp_path / "cache" / f"sha256-{stream.shards.sha256(0)}").stat().st_ino
    assert [entry for entry in done if entry[1] == inode] == [("fsync", inode), ("rename", inode)]
