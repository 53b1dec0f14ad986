"""Samples that are read before their shard has come, from real servers: those of the whole shard, or from it."""

import itertools
import json
import shutil
import struct

import pytest

from maskmatch_scale.data.faults import BadSample, NotFetched
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.shards import range_reads
from maskmatch_scale.data.shards.folder import fetch_options
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.offsets import side_car, unpacked
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.tools.survey import survey
from maskmatch_scale.recipe import DataRecipe
from tests.data import s3_server as s3
from tests.data.bad_shards import jpeg, tar_bytes
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.foreign_shards import energon, write_tars
from tests.data.remote.common import wait_until
from tests.data.remote.conftest import clean_stores, either_way, no_proxy, short_pauses  # noqa: F401 - fixtures

COUNTS = (30, 40)
WAIT = Fault(of="whole", stall_after=0)
"""Whole shards do not come."""
LATE = Fault(of="whole", delay_s=0.5)


def kept(sample):
    return sample


def indexed(folder):
    survey({"unlabelled": [str(folder / "*.tar")]}, [], folder, fetch_options(DataRecipe(root="")), offsets=True)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two shards with an index and side-cars."""
    folder = tmp_path_factory.mktemp("written")
    write_tars(folder, COUNTS)
    return indexed(folder)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "served")


def stream_of(root, tmp_path, **more):
    options = {"cache_dir": str(tmp_path / f"cache-{next(_numbers)}"), "fetch_timeout_s": 2.0, "fetch_attempts": 2}
    return ShardStream(root, "unlabelled", DataRecipe(root=root, **options | more), strict=False)


_numbers = itertools.count()


def ranges_of(server):
    return [request for request in server.requests if request.range is not None]


def test_a_sample_comes_before_its_shard(folder, tmp_path):
    local = ShardStream(folder, "unlabelled")
    with FaultyServer(folder, {"00000.tar": WAIT}) as server:
        stream = stream_of(server.url, tmp_path)
        assert stream.load(0, 7, kept) == local.read(0, 7)
        size, car = (folder / "00000.tar").stat().st_size, (folder / side_car("00000.tar")).read_bytes()
        start, stop = unpacked(car, COUNTS[0], size, None).span(7)
        sample = stop - start
        assert [asked.range for asked in ranges_of(server)] == [f"bytes={start}-{stop - 1}"]
        assert {request.path for request in server.requests} <= {"index.json", side_car("00000.tar"), "00000.tar"}
        server.wait_for("00000.tar")
        wait_until(lambda: any(r.path == "00000.tar" and r.range is None for r in server.requests))
        figures = stream.take_figures()
        # Of a sample its headers and its texts are read too; of its shard, 8 bytes a sample.
        assert (figures.ranges, figures.shards) == (1, 0)
        assert len(local.read(0, 7).image) < sample < len(local.read(0, 7).image) + 6000
        assert figures.bytes == sample + 8 * (COUNTS[0] + 1) + 60


def test_it_is_the_same_as_from_the_whole_shard(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(range_reads, "_SHARE", 1)
    local = ShardStream(folder, "unlabelled")
    with FaultyServer(folder, {"00000.tar": WAIT, "00001.tar": WAIT}) as server:
        stream = stream_of(server.url, tmp_path)
        for number in range(len(local)):
            shard, place = local.locate(number)
            assert stream.load(shard, place, kept) == local.read(shard, place)
        assert stream.take_figures().ranges == sum(COUNTS)


def test_a_shard_that_is_here_is_used(folder, tmp_path):
    with FaultyServer(folder) as server:
        stream = stream_of(server.url, tmp_path)
        stream.load(0, 0, kept)
        wait_until(lambda: stream.cache.inode(*stream._version(0)) is not None)
        before = len(server.requests)
        local = ShardStream(folder, "unlabelled")
        for place in range(COUNTS[0]):
            assert stream.load(0, place, kept) == local.read(0, place)
        assert len(server.requests) == before
        assert len(ranges_of(server)) <= 1
        figures = stream.take_figures()
        assert (figures.ranges, figures.shards) == (1, 1)


def test_each_shard_is_read_so_in_part_only(folder, tmp_path):
    """Then the whole one is waited for."""
    with FaultyServer(folder, {"00000.tar": LATE}) as server:
        stream = stream_of(server.url, tmp_path)
        for place in range(COUNTS[0]):
            stream.load(0, place, kept)
        sent = sum(request.sent for request in ranges_of(server))
    size = (folder / "00000.tar").stat().st_size
    assert size / 12 < sent <= size / 8
    assert stream.take_figures().shards == 1


def test_a_process_reads_so_a_few_samples_only(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(range_reads, "_MOST_SAMPLES", 3)
    with FaultyServer(folder, {"00000.tar": LATE, "00001.tar": LATE}) as server:
        stream = stream_of(server.url, tmp_path)
        for shard, place in itertools.product((0, 1), range(3)):
            stream.load(shard, place, kept)
        assert len(ranges_of(server)) == 3
    assert stream.take_figures().ranges == 3


FAILING = {
    "no ranges": None,
    "500": Fault(of="ranges", status=500),
    "404": Fault(of="ranges", status=404),
    "a stall": Fault(of="ranges", stall_after=100),
    "a cut": Fault(of="ranges", cut_after=1000),
    "a cut without a length": Fault(of="ranges", cut_after=1000, no_length=True),
    "another range": Fault(of="ranges", headers={"Content-Range": "bytes 0-99/100"}),
}


@pytest.mark.parametrize("fault", FAILING)
def test_what_fails_is_read_from_the_whole_shard(folder, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(range_reads, "_TIMEOUT_S", 0.3)
    local = ShardStream(folder, "unlabelled")
    faults = {} if FAILING[fault] is None else {"00000.tar": FAILING[fault]}
    with FaultyServer(folder, faults, ranges=fault != "no ranges") as server:
        stream = stream_of(server.url, tmp_path)
        for place in range(4):
            assert stream.load(0, place, kept) == local.read(0, place)
        assert len(ranges_of(server)) == 1
        assert stream.take_figures().ranges == 0


@pytest.mark.parametrize("conditions", [True, False], ids=["If-Match", "no If-Match"])
@pytest.mark.parametrize("etags", [True, False], ids=["ETag", "no ETag"])
def test_a_shard_that_was_changed_in_place_gives_no_wrong_sample(folder, tmp_path, etags, conditions):
    """Of the same size, with the same headers: the index knows its checksum, the side-car that of each sample."""
    data = bytearray((folder / "00000.tar").read_bytes())
    at = data.index(b"\xff\xd8\xff")
    data[at + 1000] ^= 1
    (folder / "00000.tar").write_bytes(data)
    with FaultyServer(folder, etags=etags, conditions=conditions) as server:
        stream = stream_of(server.url, tmp_path)
        with pytest.raises(NotFetched, match="checksum"):
            stream.load(0, 0, kept)
        assert stream.load(1, 0, kept) == ShardStream(folder, "unlabelled").read(1, 0)


def test_a_shard_of_another_etag_than_the_index_says(folder, tmp_path):
    content = json.loads((folder / "index.json").read_text())
    content["streams"]["unlabelled"]["shards"][0]["etag"] = '"another"'
    (folder / "index.json").write_text(json.dumps(content))
    with FaultyServer(folder) as server:
        with pytest.raises(NotFetched, match="ETag"):
            stream_of(server.url, tmp_path).load(0, 0, kept)
        assert ranges_of(server)[0].headers["If-Match"] == '"another"'


@pytest.mark.parametrize("how", ["missing", "damaged", "of another shard", "no such index"])
def test_side_cars_that_are_of_no_use(folder, tmp_path, how):
    car = folder / side_car("00000.tar")
    if how == "missing":
        shutil.rmtree(car.parent)
    elif how == "damaged":
        data = car.read_bytes()
        car.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "of another shard":
        shutil.copy(folder / side_car("00001.tar"), car)
    else:
        content = json.loads((folder / "index.json").read_text())
        del content["offsets"]
        (folder / "index.json").write_text(json.dumps(content))
    local = ShardStream(folder, "unlabelled")
    with FaultyServer(folder) as server:
        stream = stream_of(server.url, tmp_path)
        for shard, place in ((0, 0), (0, 1), (1, 0)):
            assert stream.load(shard, place, kept) == local.read(shard, place)
        asked = [request.path for request in server.requests if request.path.endswith(".offsets")]
        by_ranges = {request.path for request in ranges_of(server)}
    assert asked == [] if how == "no such index" else asked.count(side_car("00000.tar")) == 1
    assert len(asked) <= 1 or how != "missing"  # no other one of this server is asked for
    assert by_ranges == ({"00001.tar"} if how in ("damaged", "of another shard") else set())


def test_a_sample_that_cannot_be_decoded_is_bad_by_the_whole_shard(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    members = [(f"{n:03d}.jpg", b"no picture" if n == 3 else jpeg(n)) for n in range(20)]
    (folder / "a.tar").write_bytes(tar_bytes(members))
    indexed(folder)

    def decode(sample):
        if sample.image == b"no picture":
            raise BadSample("not_an_image", "no")
        return sample

    with FaultyServer(folder) as server:
        stream = stream_of(server.url, tmp_path)
        with pytest.raises(BadSample):
            stream.load(0, 3, decode)
        assert stream.key(0, 3) == "003"
        assert len(ranges_of(server)) == 1


def test_what_comes_twice_in_a_shard_is_found(tmp_path):
    """By their bytes alone both are sound, so nothing of this shard is read by ranges."""
    folder = tmp_path / "served"
    folder.mkdir()
    names = [f"{n:03d}" for n in range(20)] + ["003"]
    (folder / "a.tar").write_bytes(tar_bytes([(f"{name}.jpg", jpeg(n)) for n, name in enumerate(names)]))
    indexed(folder)
    with FaultyServer(folder) as server:
        stream = stream_of(server.url, tmp_path)
        assert stream.load(0, 3, kept).key == "003"
        with pytest.raises(BadSample, match="earlier sample"):
            stream.load(0, 20, kept)
        assert not ranges_of(server)


def energon_car(folder, tar, samples):
    """As Energon writes it: where each sample begins, and where the last one ends."""
    starts = unpacked((folder / side_car(tar.name)).read_bytes(), samples, None, None).starts
    return struct.pack(f"<{len(starts)}Q", *starts.tolist())


def test_side_cars_of_energon(tmp_path):
    root = tmp_path / "served"
    energon(root, COUNTS)
    tars = sorted((root / "shards").glob("*.tar"))
    indexed(root / "shards")
    for tar, samples in zip(tars, COUNTS, strict=True):
        tar.with_suffix(".tar.idx").write_bytes(energon_car(root / "shards", tar, samples))
    shutil.rmtree(root / "shards/offsets")
    local = ShardStream(root, "unlabelled", strict=False)
    paths = {f"shards/{tar.name}": WAIT for tar in tars}
    with FaultyServer(root, paths) as server:
        stream = stream_of(server.url, tmp_path)
        for shard, place in ((0, 0), (1, 39), (0, 29)):
            assert stream.load(shard, place, kept) == local.read(shard, place)
        assert stream.take_figures().ranges == 3
    # Of a shard that was written anew, with a sample more.
    tars[0].with_suffix(".tar.idx").write_bytes(tars[1].with_suffix(".tar.idx").read_bytes())
    tars[1].with_suffix(".tar.idx").unlink()
    with FaultyServer(root) as server:
        stream = stream_of(server.url, tmp_path)
        assert stream.load(0, 0, kept) == local.read(0, 0)
        assert stream.load(1, 0, kept) == local.read(1, 0)
        assert not ranges_of(server)


def test_an_index_here_of_shards_elsewhere(written, tmp_path):
    """Its side-cars are beside it, and read from there."""
    with FaultyServer(written) as server:
        urls = [f"{server.url}/{number:05d}.tar" for number in range(2)]
        options = fetch_options(DataRecipe(root="", cache_dir=str(tmp_path / "cache")))
        survey({"unlabelled": urls}, [], tmp_path / "out", options, offsets=True)
        server.set_faults({"00000.tar": WAIT})
        before = len(server.requests)
        stream = stream_of(str(tmp_path / "out"), tmp_path)
        assert stream.load(0, 5, kept).image == ShardStream(written, "unlabelled").read(0, 5).image
        assert len(ranges_of(server)) == 1
        assert all(request.path == "00000.tar" for request in server.requests[before:])


def test_object_stores(s3_server, written, tmp_path, clean_stores, either_way, monkeypatch):  # noqa: F811
    bucket = s3.Bucket(s3_server, f"ranges{next(_numbers)}").make()
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        bucket.put(f"x/{file.relative_to(written)}", file.read_bytes())
    for name, value in s3.SIGNED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_server}")
    monkeypatch.setattr(ShardCache, "prefetch", lambda *_: True)
    local = ShardStream(written, "unlabelled")
    stream = stream_of(f"s3://{bucket.name}/x", tmp_path)
    for shard, place in ((0, 0), (1, 39), (0, 29)):
        assert stream.load(shard, place, kept) == local.read(shard, place)
    assert stream.take_figures().ranges == 3


def test_an_index_that_has_side_cars_keeps_them(folder):
    """Called again for more shards, and for one that was written anew."""
    write_tars(folder, (*COUNTS[:1], 41, 20))
    index = survey({"unlabelled": [str(folder / "*.tar")]}, [], folder, fetch_options(DataRecipe(root="")))
    assert index.offsets
    assert ShardIndex.load(folder).offsets
    for entry in index.streams["unlabelled"].shards:
        data = (folder / side_car(entry.file)).read_bytes()
        assert unpacked(data, entry.samples, entry.bytes, entry.sha256) is not None
