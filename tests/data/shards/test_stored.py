"""Large indexes: tables in files of their own, and what the processes of a node share."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from maskmatch_scale.data import node_arrays
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards import finding, foreign, stored
from maskmatch_scale.data.shards.columns import packed, reference, unpacked
from maskmatch_scale.data.shards.finding import find_index
from maskmatch_scale.data.shards.folder import fetch_options
from maskmatch_scale.data.shards.index import ShardIndex, ShardTable
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.recipe import DataRecipe
from tests.conftest import ShapesSource, write_shards
from tests.data import foreign_shards
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.remote.common import FORK, in_processes

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
optional = st.fixed_dictionaries(
    {"file": names, "samples": st.integers(1, 9)},
    optional={
        "bytes": st.integers(1, 1 << 50),
        "sha256": st.binary(min_size=32, max_size=32).map(bytes.hex),
        "etag": names,
    },
)
entries = st.lists(optional, max_size=6)


def is_mapped(table):
    return isinstance(table.samples, node_arrays._Mapped) and isinstance(table.starts, node_arrays._Mapped)


def options(folder):
    return fetch_options(DataRecipe(root="x", cache_dir=str(folder / "cache")))


@pytest.fixture
def small(monkeypatch):
    """Four shards are many, and a file of 100 bytes is large."""
    monkeypatch.setattr(stored, "LARGE", 4)
    for module in (stored, finding):
        monkeypatch.setattr(module, "LARGE_BYTES", 100)


@pytest.fixture
def folder(tmp_path, small):
    """A folder with a table for `unlabelled`."""
    counts = {"labelled": 3, "unlabelled": 8}
    write_shards(ShapesSource(counts), tmp_path / "data", workers=1, samples_per_shard=4, progress=False)
    return tmp_path / "data"


@given(entries)
def test_a_table_from_a_file_is_the_one_from_json(rows):
    from_json = ShardTable(rows)
    data = packed(from_json.columns())
    for columns in (unpacked(data, reference("x", data, from_json.columns()), "x"), from_json.all_columns()):
        table = ShardTable.of_columns(columns)
        assert table == from_json
        assert list(table) == list(from_json)
        assert table.starts.tolist() == from_json.starts.tolist()
        assert table.identities().tobytes() == from_json.identities().tobytes()
        assert table.has_addresses == from_json.has_addresses
        assert [table.locate(n) for n in range(table.starts[-1])] == [
            from_json.locate(n) for n in range(from_json.starts[-1])
        ]


def test_identities_are_what_they_were():
    """Pinned: a run on an archive of others goes on only if they stay the same."""
    rows = [
        {"file": "https://me:secret@host/a.tar?sig=1", "samples": 1, "etag": '"é"'},
        {"file": "00001.tar", "samples": 1, "bytes": 7},
        {"file": "b@c#1", "samples": 1, "sha256": "7" * 64},
    ]
    for table in (ShardTable(rows), ShardTable.of_columns(ShardTable(rows).all_columns())):
        assert hashlib.sha256(table.identities().data).hexdigest()[:16] == "a0555e0cd405e2a4"
    assert ShardTable(rows[1:]).identities()[:32].tobytes() == ShardTable(rows).identities()[32:64].tobytes()


def test_an_index_names_the_file_of_a_large_stream(folder, tmp_path):
    content = json.loads((folder / "index.json").read_text())
    assert content["format"] == 2
    assert isinstance(content["streams"]["labelled"]["shards"], list)
    said = content["streams"]["unlabelled"]["shards"]
    assert (said["shards"], said["samples"]) == (8, 8)
    assert load((folder / said["table"]).read_bytes())["samples"].tolist() == [1] * 8  # by the library alone
    index = find_index(str(folder), options(tmp_path))
    assert is_mapped(index.streams["unlabelled"].shards)
    assert index == ShardIndex.load(folder) == find_index(str(folder))
    assert ShardIndex.parse(index.to_json(), "x") == index
    stream = ShardStream(folder, "unlabelled")
    assert len({stream[number].key for number in range(8)}) == 8


def test_a_folder_of_an_archive_is_finished_again(folder):
    """The writer reads the table, too: nothing is written twice, and a lost shard is written again."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"}
    lost = next(folder.glob("unlabelled-*.tar"))
    lost.unlink()
    source = ShapesSource({"labelled": 3, "unlabelled": 8})
    write_shards(source, folder, workers=1, samples_per_shard=4, progress=False)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix != ".lock"}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name] and name.endswith(".tar")} == {lost.name}


def test_only_one_process_reads_the_table(folder, tmp_path):
    first = find_index(str(folder), options(tmp_path))
    next(folder.glob("shards-*.safetensors")).unlink()
    assert find_index(str(folder), options(tmp_path)) == first
    with pytest.raises(
        DataError, match=r"^/[^ ]*shards-unlabelled-.*\.safetensors: No such file .*names this file: copy it"
    ):
        find_index(str(folder))


def test_a_stale_table_is_not_used(folder, tmp_path):
    """Neither the one of another index, nor a damaged one; a new index has a new table, and the old one is removed."""
    table = next(folder.glob("shards-*.safetensors"))
    whole = table.read_bytes()
    index = ShardIndex.load(folder)
    shards = ShardTable(index.streams["unlabelled"].shards[1:])
    other = index.model_copy(
        update={
            "streams": {
                **index.streams,
                "unlabelled": index.streams["unlabelled"].model_copy(update={"shards": shards}),
            }
        }
    )
    stored.write_index(tmp_path, other)
    for stale in (next(tmp_path.glob("shards-*.safetensors")).read_bytes(), whole[:-1], whole[:-1] + b"\x07"):
        table.write_bytes(stale)
        for how in (None, options(tmp_path)):
            with pytest.raises(DataError, match=r"^/[^ ]*safetensors: not the table that the index") as caught:
                find_index(str(folder), how)
            assert "\n" not in str(caught.value)
    table.write_bytes(whole)
    assert find_index(str(folder), options(tmp_path)) == index
    stored.write_index(folder, other)
    assert not table.exists()
    assert find_index(str(folder), options(tmp_path)) == other


def test_an_index_that_cannot_be_written_leaves_the_one_before(folder, small_disk):
    disk = small_disk(kib=24)
    index = ShardIndex.load(folder)
    stored.write_index(disk.path, index)
    disk.fill()
    fewer = index.streams["unlabelled"].model_copy(
        update={"shards": ShardTable(index.streams["unlabelled"].shards[:3])}
    )
    with pytest.raises(OSError, match="No space"):
        stored.write_index(disk.path, index.model_copy(update={"streams": {"unlabelled": fewer}}))
    assert ShardIndex.load(disk.path) == index


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": np.array([1, 1, 0])}, "out of range"),
        ({"samples": np.array([1, 1, 2])}, "out of range"),
        ({"samples": np.array([2**63 - 1, 2**63 - 1, 5])}, "out of range"),  # 3, modulo 2⁶⁴
        ({"samples": np.array([1, 1])}, r"column samples is int64 \(2,\)"),
        ({"samples": np.ones(3, np.uint8)}, "column samples is uint8"),
        ({"bytes": np.array([0, -1, 0])}, "out of range"),
        ({"file_ends": np.array([1, 1, 3])}, "files is not a list of texts"),
        ({"file_ends": np.array([1, 2, 4])}, "files is not a list of texts"),
        ({"file_ends": np.array([2, 1, 3])}, "files is not a list of texts"),
        ({"files": np.array([97, 195, 40], np.uint8)}, "files is not a list of texts"),
        ({"files": np.array([97, 195, 169], np.uint8)}, "files is not a list of texts"),  # an é that is cut
        ({"sha256": np.zeros(64, np.uint8)}, "not a checksum for each"),
        ({"etags": np.zeros(0, np.uint8)}, "it has the columns"),
        ({"more": np.zeros(3)}, "it has the columns"),
    ],
)
def test_a_table_that_is_not_well_formed(change, message):
    whole = ShardTable([{"file": name, "samples": 1, "sha256": "0" * 64} for name in "abc"]).columns()
    said = reference("x", packed(whole), whole)
    data = packed({**whole, **change})
    said = said.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    with pytest.raises(DataError, match=f"x: .*{message}.*; write the index again"):
        unpacked(data, said, "x")


@given(entries, st.data())
def test_some_of_the_shards(rows, data):
    """They are taken column by column: entry by entry, half of a million shards take each rank half a minute."""
    numbers = data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True) if rows else st.just([]))
    table, expected = ShardTable(rows), ShardTable(rows[number] for number in numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardTable, "__getitem__", None)
        taken = table.take(numbers)
    assert taken == expected
    assert taken.starts.tolist() == expected.starts.tolist()
    assert taken.identities().tobytes() == expected.identities().tobytes()
    assert {name: column.tolist() for name, column in taken.columns().items()} == {
        name: column.tolist() for name, column in expected.columns().items()
    }


def test_a_type_that_numpy_does_not_have():
    header = json.dumps({"files": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(2)
    said = reference("x", data, {"samples": np.ones(3, np.int64)})
    with pytest.raises(DataError, match="x: a column is BF16; write the index again"):
        unpacked(data, said, "x")


@given(st.binary(max_size=200))
def test_a_table_that_is_no_table(data):
    digest = hashlib.sha256(data).hexdigest()
    said = reference("x", b"1", {"samples": np.ones(3, np.int64)})
    with pytest.raises(DataError, match=r"safetensors|columns"):
        unpacked(data, said.model_copy(update={"bytes": len(data), "sha256": digest}), "x")


def test_an_unknown_format_is_said_by_its_number():
    for content in ({"format": 3, "streams": {"x": {"rows": 7}}}, {"format": "1"}):
        with pytest.raises(DataError, match=r"format .* is unknown; this version reads 1 and 2"):
            ShardIndex.parse(json.dumps(content).encode(), "x")


@pytest.mark.parametrize("named", [False, True])
def test_a_large_json_is_parsed_by_one_process(tmp_path, small, monkeypatch, named):
    """Which another tool or an older version wrote; also if the root names the file."""
    rows = [{"file": f"{number}.tar", "samples": 3, "etag": "x"} for number in range(5)]
    index = ShardIndex(
        source="x",
        classes=("é",),
        palette=((1, 2, 3),),
        settings={"a": [1]},
        streams={"b": {"labelled": True, "shards": rows}, "none": {"labelled": False, "shards": []}},
    )
    (tmp_path / "index.json").write_bytes(index.to_json())
    root = str(tmp_path / "index.json") if named else str(tmp_path)
    first = find_index(root, options(tmp_path))
    assert first == index
    assert is_mapped(first.streams["b"].shards)
    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "parse", None)
        assert find_index(root, options(tmp_path)) == index
    # Other content of the same size and time is not taken for it.
    status = (tmp_path / "index.json").stat()
    (tmp_path / "index.json").write_bytes(index.to_json().replace(b"4.tar", b"7.tar"))
    os.utime(tmp_path / "index.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert find_index(root, options(tmp_path)).streams["b"].shards.file(4) == "7.tar"
    (tmp_path / "index.json").write_bytes(index.to_json()[:-5])
    with pytest.raises(DataError, match="not JSON"):
        find_index(root, options(tmp_path))


def test_a_table_of_a_server_is_fetched_once_by_a_node(folder, tmp_path):
    index = ShardIndex.load(folder)
    with FaultyServer(folder) as server:
        for root in (server.url, server.url, f"{server.url}/index.json"):
            assert find_index(root, options(tmp_path)) == index
        table = next(folder.glob("shards-*.safetensors")).name
        assert [request.path for request in server.requests].count(table) == 1
        next(folder.glob("shards-*.safetensors")).write_bytes(b"another")
        assert find_index(server.url, options(tmp_path)) == index
        with pytest.raises(DataError, match=f"^http[^ ]*{table}: tried once and failed: 7 bytes"):
            find_index(server.url, fetch_options(DataRecipe(root="x", cache_dir=str(tmp_path / "b"), fetch_attempts=1)))


def test_nobody_else_reads_a_table_that_was_fetched(folder, tmp_path):
    """Addresses in it may have secrets."""
    with FaultyServer(folder) as server:
        find_index(server.url, options(tmp_path))
    (own,) = (tmp_path / "cache").iterdir()
    assert own.stat().st_mode & 0o777 == 0o700
    kept = [path.name for path in own.iterdir() if not path.name.endswith(".lock")]
    assert len([name for name in kept if name.startswith("shards1-")]) == 1
    assert not [name for name in kept if name.startswith("sha256-")]


def test_processes_that_wait_for_a_table_are_told_that_it_cannot_be_fetched(folder, tmp_path, monkeypatch):
    """They do not try again one after the other, which would take each of them minutes."""
    monkeypatch.setattr(stored, "LARGE_BYTES", 1 << 20)  # as ever: the JSON is small
    table, start = next(folder.glob("shards-*.safetensors")).name, FORK.Barrier(3)
    with FaultyServer(folder, {table: Fault(delay_s=1, status=404)}) as server:

        def work(_number):
            start.wait()
            with pytest.raises(DataError, match=f"{table}: tried once and failed: .*404"):
                find_index(server.url, options(tmp_path))

        assert in_processes(3, work) == [0] * 3
        assert [request.path for request in server.requests].count(table) == 1


def test_a_wids_list_with_all_sizes_is_parsed_by_one_process(tmp_path, small, monkeypatch):
    root = foreign_shards.wids(tmp_path / "theirs")
    first = find_index(root, options(tmp_path))
    assert first == find_index(root)
    assert not first.streams["unlabelled"].labelled
    with monkeypatch.context() as patch:
        patch.setattr(foreign, "wids", None)
        assert find_index(root, options(tmp_path)) == first
    content = json.loads(Path(root).read_text())
    content["shardlist"][0]["nsamples"] += 1
    Path(root).write_text(json.dumps(content))
    assert find_index(root, options(tmp_path)).streams["unlabelled"].samples == first.streams["unlabelled"].samples + 1
    # One that does not say all sizes is read by each process: the disk is asked for them.
    del content["shardlist"][0]["filesize"]
    Path(root).write_text(json.dumps(content))
    for grown in (0, 512):
        with (tmp_path / "theirs" / "00000.tar").open("ab") as file:
            file.write(bytes(grown))
        size = (tmp_path / "theirs" / "00000.tar").stat().st_size
        assert find_index(root, options(tmp_path)).streams["unlabelled"].shards.size(0) == size


@pytest.mark.parametrize("layout", foreign_shards.LAYOUTS)
def test_columns_of_other_tools_are_mapped(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(stored, "LARGE", 3)
    root = foreign_shards.LAYOUTS[layout](tmp_path / "theirs")
    found = find_index(root, options(tmp_path))
    assert is_mapped(found.streams["unlabelled"].shards)
    assert found == find_index(root)
    shards, plain = found.streams["unlabelled"].shards, find_index(root).streams["unlabelled"].shards
    assert shards.identities().tobytes() == plain.identities().tobytes()


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "cache").write_text("a file")
    found = find_index(str(folder), options(tmp_path))
    assert found == ShardIndex.load(folder)
    assert not is_mapped(found.streams["unlabelled"].shards)
