"""Reading samples by their place, and what a folder that is not as its index says gets."""

import io
import json
import shutil
import tarfile

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.index import ShardIndex
from maskmatch_scale.data.shards import ShardStream, verify


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


def test_a_whole_folder_has_no_faults(shapes):
    assert verify(shapes) == []


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
    assert any(file in fault for fault in verify(folder))


def test_shard_of_another_size(folder):
    file = ShardIndex.load(folder).streams["dev"].shards[0].file
    with (folder / file).open("ab") as shard:
        shard.write(b"\0" * 512)
    with pytest.raises(DataError, match=f"{file}.*bytes where the index says"):
        ShardStream(folder, "dev")


def test_changed_bytes_are_found_by_verify(folder):
    file = ShardIndex.load(folder).streams["val"].shards[0].file
    content = bytearray((folder / file).read_bytes())
    content[700] ^= 1
    (folder / file).write_bytes(content)
    assert any(file in fault and "checksum" in fault for fault in verify(folder))


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
    with pytest.raises(DataError, match="'nonsense' is not in the index; it has: labelled"):
        ShardStream(shapes, "nonsense")


def test_labelled_sample_without_a_label(folder):
    entry = ShardIndex.load(folder).streams["labelled"].shards[0]
    _write_tar(folder / entry.file, {"a.jpg": b"x"}, size=entry.bytes)
    index = json.loads((folder / "index.json").read_text())
    index["streams"]["labelled"]["shards"][0] |= {"samples": 1, "bytes": (folder / entry.file).stat().st_size}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"sample 'a' .* has no \.png label map"):
        ShardStream(folder, "labelled")[0]


def _write_tar(path, members, size):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
