"""Reading samples by their place, and what a folder that is not as its index says gets."""

import json
import multiprocessing
import os
import pickle
import shutil
import tarfile

import pytest

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.shards.index import ShardEntry, ShardIndex, ShardTable
from maskmatch_scale.data.shards.reading import ShardStream
from tests.conftest import rewrite_shard


@pytest.fixture
def folder(shapes, tmp_path):
    return shutil.copytree(shapes, tmp_path / "shards")


def test_every_sample_by_its_number(shapes):
    stream = ShardStream(shapes, "labelled")
    keys = [stream[number].key for number in range(len(stream))]
    assert keys == [f"labelled-{number:04d}" for number in range(8)]
    assert len({stream[number].shard for number in range(8)}) > 1
    assert all(stream[number].label is not None for number in range(8))


def test_unlabelled_shards_hold_no_label(shapes):
    stream = ShardStream(shapes, "unlabelled")
    assert all(stream[number].label is None for number in range(len(stream)))
    for shard in stream.entry.shards:
        with tarfile.open(shapes / shard.file) as tar:
            assert not [name for name in tar.getnames() if name.endswith(".png")]


def test_webdataset_reads_the_shards(shapes):
    import webdataset

    files = [str(shapes / shard.file) for shard in ShardIndex.load(shapes).streams["labelled"].shards]
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    assert [sample["__key__"] for sample in samples][:2] == ["labelled-0000", "labelled-0001"]
    assert {"webp", "png"} <= samples[0].keys()


def test_missing_folder_and_index(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        ShardIndex.load(tmp_path / "none")
    with pytest.raises(DataError, match=r"index\.json: no index"):
        ShardIndex.load(tmp_path)


def test_missing_shard(folder):
    file = ShardIndex.load(folder).streams["labelled"].shards[1].file
    (folder / file).unlink()
    with pytest.raises(DataError, match=file):
        ShardStream(folder, "labelled")


def test_shard_of_another_size(folder):
    file = ShardIndex.load(folder).streams["dev"].shards[0].file
    with (folder / file).open("ab") as shard:
        shard.write(b"\0" * 512)
    with pytest.raises(DataError, match=f"{file}.*bytes where the index says"):
        ShardStream(folder, "dev")


def test_fewer_samples_than_the_index_says(folder):
    index = json.loads((folder / "index.json").read_text())
    index["streams"]["labelled"]["shards"][0]["samples"] += 1
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="samples where the index says"):
        ShardStream(folder, "labelled")[0]


def test_index_that_does_not_parse(folder):
    (folder / "index.json").write_text('{"source": 3}')
    with pytest.raises(DataError, match=r"index\.json: source"):
        ShardIndex.load(folder)


def test_unknown_stream(shapes):
    with pytest.raises(DataError, match="stream 'nonsense' is not in its index, which has labelled"):
        ShardStream(shapes, "nonsense")


def test_labelled_sample_without_a_label(folder):
    file = ShardIndex.load(folder).streams["labelled"].shards[0].file
    rewrite_shard(folder, file, {"labelled-0000.png": None})
    with pytest.raises(BadSample, match="labelled-0000") as caught:
        ShardStream(folder, "labelled")[0]
    assert caught.value.reason == "no_label"
    assert pickle.loads(pickle.dumps(caught.value)).reason == "no_label"


def test_a_shard_cut_short_keeps_the_samples_that_are_whole(folder):
    entry = ShardIndex.load(folder).streams["unlabelled"].shards[0]
    whole = ShardStream(folder, "unlabelled")
    raws = [whole[number] for number in range(entry.samples)]
    os.truncate(folder / entry.file, entry.bytes // 2)
    with pytest.raises(DataError, match="bytes where the index says"):
        ShardStream(folder, "unlabelled")
    lenient = ShardStream(folder, "unlabelled", strict=False)
    assert lenient[0] == raws[0]
    with pytest.raises(BadSample) as caught:
        lenient[entry.samples - 1]
    assert caught.value.reason == "truncated"


def test_a_missing_shard_is_a_fault_of_its_samples_where_bad_ones_may_be_skipped(folder):
    file = ShardIndex.load(folder).streams["unlabelled"].shards[0].file
    (folder / file).unlink()
    stream = ShardStream(folder, "unlabelled", strict=False)
    with pytest.raises(BadSample, match=file) as caught:
        stream[0]
    assert caught.value.reason == "shard_unreadable"
    assert stream[len(stream) - 1].image


def test_forked_and_spawned_processes_open_shards_of_their_own(shapes):
    stream = ShardStream(shapes, "labelled")
    first = stream[0]
    assert pickle.loads(pickle.dumps(stream))[0] == first
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    readers = [context.Process(target=lambda: results.put([stream[n].key for n in range(8)])) for _ in range(3)]
    for reader in readers:
        reader.start()
    keys = [results.get(timeout=30) for _ in readers]
    assert keys == [[f"labelled-{number:04d}" for number in range(8)]] * 3


def test_an_index_of_shards_elsewhere(shapes, tmp_path):
    """Files of an index may be absolute; its own path may be given instead of a folder's."""
    content = json.loads((shapes / "index.json").read_text())
    for shard in content["streams"]["dev"]["shards"]:
        shard["file"] = str(shapes / shard["file"])
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert ShardStream(tmp_path / "other.json", "dev")[0].key == "dev-0000"


def test_the_table_of_shards_is_as_its_entries():
    entries = [
        {"file": f"a/b-{number}.tar", "samples": number + 1, "bytes": 10 * number + 1, "sha256": f"{number:064x}"}
        for number in range(20)
    ]
    table = ShardTable(entries)
    assert [entry.model_dump(exclude_none=True) for entry in table] == table.as_json() == entries
    assert table.starts.tolist() == [sum(range(number + 1)) for number in range(21)]
    assert table[-1] == ShardEntry(**entries[-1])
    assert ShardTable(table) == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "1.samples: .*greater"),
        ({"samples": "x"}, "1.samples: .*integer"),
        ({"sha256": "zz"}, "1.sha256"),
        ({"file": None}, "1.file"),
        ({"extra": 1}, "1.extra"),
    ],
)
def test_a_wrong_entry_is_named(change, message):
    good = {"file": "a.tar", "samples": 1, "bytes": 1, "sha256": "0" * 64}
    with pytest.raises(ValueError, match=message):
        ShardTable([good, good | change])
