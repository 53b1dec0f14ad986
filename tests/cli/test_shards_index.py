"""`maskmatch shards index` where others have counted the samples: no shard is opened."""

import json
from hashlib import md5
from pathlib import Path

import pytest

from maskmatch_scale.data.remote import store_process
from maskmatch_scale.data.remote.patterns import Location
from maskmatch_scale.data.shards.folder import fetch_options
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.offsets import is_side_car_of, side_car
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.data.tools import survey
from maskmatch_scale.errors import UserError
from maskmatch_scale.files import sha256
from maskmatch_scale.recipe.sections import DataRecipe
from tests.cli.test_shards import run
from tests.data import foreign_shards
from tests.data.faulty_server import Fault, FaultyProxy, FaultyServer
from tests.data.s3_server import SIGNED, Bucket

FILLED = [count for count in foreign_shards.COUNTS if count]


def entries(out, stream="unlabelled"):
    return ShardIndex.load(out).streams[stream].shards.as_json()


def index(*arguments):
    run("index", *arguments, "--workers", 1)
    return entries(next(each for each in reversed(arguments) if not str(each).startswith("--")))


@pytest.mark.parametrize("layout", foreign_shards.LAYOUTS)
def test_counts_are_taken_from_an_index_that_exists(tmp_path, layout):
    root, out = foreign_shards.LAYOUTS[layout](tmp_path / "theirs"), tmp_path / "out"
    tars = sorted((tmp_path / "theirs").rglob("*.tar"))
    for path in tars:
        path.write_bytes(bytes(path.stat().st_size))  # not a tar any more
    found = index(root, out)
    filled = [path for path, count in zip(tars, foreign_shards.COUNTS, strict=True) if count]
    assert [entry["samples"] for entry in found] == FILLED
    assert [Path(entry["file"]).resolve() for entry in found] == filled
    assert [entry["bytes"] for entry in found] == [path.stat().st_size for path in filled]
    assert not any("sha256" in entry for entry in found)
    with pytest.raises(UserError, match="tar"):
        index(root, out, "--scan")


def test_notes_beside_the_tars_of_a_pattern(tmp_path):
    """Where a shard has none it is opened."""
    folder = tmp_path / "theirs"
    foreign_shards.img2dataset(folder)
    (folder / "00001_stats.json").unlink()
    found = index(folder / "*.tar", tmp_path / "out")
    assert [entry["samples"] for entry in found] == FILLED
    assert ["sha256" in entry for entry in found] == [False, True, False]
    (folder / "00001_stats.json").write_text("{")
    with pytest.raises(UserError, match=r"00001_stats\.json: not JSON"):
        index(folder / "*.tar", tmp_path / "other")
    assert not (tmp_path / "other" / "index.json").exists()


def test_sizes_are_asked_of_a_server(tmp_path):
    served, out = tmp_path / "served", tmp_path / "out"
    foreign_shards.img2dataset(served, (3, 5, 4))
    (served / "00000.tar").write_bytes(b"changed" * 100)
    with FaultyServer(served, {"00001.tar": Fault(times=1, status=503)}) as server:
        pattern = f"{server.url}/{{00000..00002}}.tar"
        found = index(pattern, out)
        assert not [request for request in server.requests if request.path.endswith(".tar") and request.sent]
        assert [entry["bytes"] for entry in found] == [path.stat().st_size for path in sorted(served.glob("*.tar"))]
        assert all(entry["etag"].startswith('"') for entry in found)
        before = server.gets()
        assert index(pattern, out) == found
        assert server.gets() == before  # all is noted
        foreign_shards.write_tar(served / "00003.tar", 2)
        foreign_shards.note(served / "00003.tar", 2)
        assert len(index(f"{server.url}/{{00000..00003}}.tar", out)) == 4
        assert {request.path for request in server.requests[before:]} == {"00003.tar", "00003_stats.json"}
        server.set_faults({"00002.tar": Fault(status=404)})
        with pytest.raises(UserError, match=r"00002\.tar: tried once and failed: HTTP 404"):
            index(pattern, out, "--rescan")


def test_shards_that_are_dropped_from_a_full_cache_while_they_are_looked_at(tmp_path, monkeypatch):
    """By other processes of the same command, which need the room."""
    served, out, cache = (tmp_path / name for name in ("served", "out", "cache"))
    foreign_shards.write_tar(served / "a.tar", 3)

    def read_then_drop(*arguments, **options):
        table = read_table(*arguments, **options)
        (fetched,) = cache.glob("url-*")
        fetched.unlink()
        return table

    monkeypatch.setattr(survey, "read_table", read_then_drop)
    options = fetch_options(DataRecipe(root="", cache_dir=str(cache)))
    with FaultyServer(served) as server:
        survey.survey({"unlabelled": [f"{server.url}/a.tar"]}, [], out, options, offsets=True, workers=1)
    (entry,) = entries(out)
    assert entry["sha256"] == sha256(served / "a.tar")
    assert is_side_car_of(out / side_car(entry["file"]), entry["sha256"])


def test_a_wids_list_is_written_beside_the_index(shapes, tmp_path):
    out = tmp_path / "out"
    index(shapes / "unlabelled-*.tar", out)
    content = json.loads((out / "wids-unlabelled.json").read_text())
    assert (content["__kind__"], content["wids_version"]) == ("wids-shard-index-v1", 1)
    ours = ShardIndex.load(shapes).streams["unlabelled"].shards
    assert content["shardlist"] == [
        {"url": str(shapes / shard.file), "nsamples": shard.samples, "filesize": shard.bytes} for shard in ours
    ]
    stream = ShardStream(str(out / "wids-unlabelled.json"), "unlabelled")
    assert [stream[number].key for number in range(len(stream))] == [f"unlabelled-{n:04d}" for n in range(24)]


def test_more_shards_are_added_to_the_streams_that_are_there(shapes, tmp_path):
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    foreign_shards.img2dataset(theirs)
    classes = tmp_path / "classes.txt"
    classes.write_text("ground 0 0 0\nsquare 255 0 0\ndisc 0 0 255\n")
    options = ("--labelled", shapes / "labelled-*.tar", "--classes", classes)
    run("index", shapes / "unlabelled-00000[0-2].tar", out, *options, "--workers", 1)
    before = entries(out)
    for _ in range(2):  # what is there is not added again
        found = index(shapes / "unlabelled-000002.tar", theirs, out, "--add")
        assert found[:3] == before
        assert [entry["file"] for entry in found[3:]] == [str(theirs / f"0000{n}.tar") for n in (0, 1, 3)]
        assert len(entries(out, "labelled")) == 8
        assert ShardIndex.load(out).classes == ("ground", "square", "disc")
    with pytest.raises(UserError, match="cannot have shards with and without labels"):
        run("index", out, "--add", "--split", f"unlabelled={theirs}", "--workers", 1)


def test_a_shard_that_has_changed_is_looked_at_when_more_are_added(shapes, tmp_path):
    """Its samples are not taken from the index that is there."""
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    path = foreign_shards.write_tar(theirs / "a.tar", 3)
    before = index(path, out)
    foreign_shards.write_tar(path, 5)
    found = index(shapes / "unlabelled-000002.tar", out, "--add")
    assert [entry["samples"] for entry in (before[0], found[0])] == [3, 5]
    assert found[0]["sha256"] == sha256(path)
    path.write_bytes(b"no tar any more")
    with pytest.raises(UserError, match=r"a\.tar"):
        index(shapes / "unlabelled-000002.tar", out, "--add", "--rescan")


def test_a_list_with_another_count_is_taken_when_it_is_added(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "a.tar").write_bytes(b"not opened")
    for count in (3, 5):
        (tmp_path / "list.txt").write_text(f"a.tar {count}\n")
        assert [entry["samples"] for entry in index(tmp_path / "list.txt", out, "--add")] == [count]


def test_an_index_that_does_not_parse_is_not_written_over_when_more_is_added(shapes, tmp_path):
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json: not JSON"):
        index(shapes / "unlabelled-000002.tar", tmp_path, "--add")
    assert (tmp_path / "index.json").read_text() == "{"


def test_an_empty_file_where_samples_are_noted(tmp_path):
    (tmp_path / "a.tar").touch()
    (tmp_path / "list.txt").write_text("a.tar 3\n")
    with pytest.raises(UserError, match=r"a\.tar: an empty file, where 3 samples are noted"):
        index(tmp_path / "list.txt", tmp_path / "out")


def test_an_index_without_notes_is_taken_over(shapes, tmp_path, monkeypatch):
    """As one that was written by `shards write`, or copied."""
    from maskmatch_scale.data.tools import survey

    out = tmp_path / "out"
    before = index(shapes / "unlabelled-*.tar", out)
    (out / ".survey.jsonl").unlink()
    monkeypatch.setattr(survey, "_look_at", None)
    assert index(shapes / "unlabelled-*.tar", out) == before
    assert before[0]["sha256"] == sha256(shapes / "unlabelled-000000.tar")
    assert index(shapes, tmp_path / "other") == before  # the folder's own index


def test_notes_with_secrets_stay_private(tmp_path):
    """Also when the next call is about other shards, and from before the first secret is noted."""
    theirs, listed, out = tmp_path / "theirs", tmp_path / "list.txt", tmp_path / "out"
    foreign_shards.img2dataset(theirs)
    listed.write_text("https://me:hush@host/x.tar 3 5000\n")
    for patterns, private in ((theirs, False), (listed, True), (theirs, True)):
        index(patterns, out)
        assert ("hush" in (out / ".survey.jsonl").read_text()) == private
        assert ((out / ".survey.jsonl").stat().st_mode & 0o077 == 0) == private


def test_a_pattern_without_an_ending_is_no_folder(monkeypatch):
    from maskmatch_scale.data.tools import listing

    monkeypatch.setattr(listing, "expand_with_facts", lambda pattern: [Location(f"{pattern[:-1]}a.tar", 5)])
    assert listing.listed(["s3://bucket/x/*"], "unlabelled", None) == [listing.Listed("s3://bucket/x/a.tar", bytes=5)]


def test_a_list_of_an_object_store_has_sizes_and_etags(s3_server, tmp_path, monkeypatch):
    """No object is asked for but the notes beside the shards."""
    store_process.end_all()  # those of other tests have another environment
    for name, value in SIGNED.items():
        monkeypatch.setenv(name, value)
    bucket, folder = Bucket(s3_server, "indexed").make(), tmp_path / "theirs"
    foreign_shards.img2dataset(folder, (3, 5))
    for path in folder.iterdir():
        bucket.put(f"a/{path.name}", path.read_bytes())
    pattern = f"s3://{bucket.name}/a/*.tar"
    with FaultyProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        found = index(pattern, tmp_path / "out")
        assert not [request for request in proxy.requests if request.path.endswith(".tar")]
    tars = sorted(folder.glob("*.tar"))
    assert [entry["bytes"] for entry in found] == [path.stat().st_size for path in tars]
    assert [entry["etag"] for entry in found] == [f'"{md5(path.read_bytes()).hexdigest()}"' for path in tars]
    assert not any("sha256" in entry for entry in found)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_server}")
    store_process.end_all()
    stream = ShardStream(tmp_path / "out", "unlabelled", DataRecipe(root="x", cache_dir=str(tmp_path / "cache")))
    assert [stream[number].key for number in range(8)] == [f"{number:09d}" for number in range(8)]
    bucket.put("a/00001.tar", b"")
    with pytest.raises(UserError, match=r"s3://indexed/a/00001\.tar: an empty file, where 5 samples are noted"):
        index(pattern, tmp_path / "again")
    store_process.end_all()


def test_an_index_without_the_stream(shapes, tmp_path):
    with pytest.raises(UserError, match="it has no stream 'test' but 'labelled'"):
        run("index", tmp_path / "out", "--split", f"test={shapes}", "--classes", "voc", "--workers", 1)
