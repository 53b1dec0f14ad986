"""`verify` names every fault of a folder, once, with its reason."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.tools.shard_check import Fault
from maskmatch_scale.data.tools.verify import verify
from maskmatch_scale.files import sha256
from tests.data.bad_shards import CLASSES, bad_shards, not_tars, sample, tar_bytes


@pytest.fixture
def folder(shapes, tmp_path):
    return shutil.copytree(shapes, tmp_path / "shards")


def write_folder(root, streams):
    """A shard folder of tars made in memory: stream → (labelled, [(bytes, samples)])."""
    root.mkdir(exist_ok=True)
    content = {}
    for name, (labelled, shards) in streams.items():
        entries = []
        for number, (data, samples) in enumerate(shards):
            file = f"{name}-{number:06d}.tar"
            (root / file).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            entries.append({"file": file, "samples": samples, "bytes": max(1, len(data)), "sha256": digest})
        content[name] = {"labelled": labelled, "shards": entries}
    names = [f"class{n}" for n in range(CLASSES)]
    index = {"source": "test", "classes": names, "palette": [[0, 0, 0]] * CLASSES, "streams": content}
    (root / "index.json").write_text(json.dumps(index))
    return root


def edit_index(root, change):
    index = json.loads((root / "index.json").read_text())
    change(index["streams"])
    (root / "index.json").write_text(json.dumps(index))


def told(faults):
    return [(fault.shard, fault.key, fault.reason) for fault in faults]


def test_a_whole_folder_has_no_faults(shapes):
    assert list(verify(shapes)) == []
    assert list(verify(shapes / "index.json", deep=False)) == []


def test_a_label_map_alone_is_named_as_such(tmp_path):
    """Label maps without their images: the message says so, and what else the .png may be."""
    data = tar_bytes([("a.png", b"x"), ("b.jpg", b"x")])
    found = list(verify(write_folder(tmp_path / "shards", {"labelled": (True, [(data, 2)])})))
    assert [(fault.key, fault.reason) for fault in found] == [("a", "no_image"), ("b", "no_label")]
    assert (
        "only a label map (.png), no image member (one of jpg, jpeg, webp, tif, tiff); add its image, or if the .png is"
        in str(found[0])
    )
    assert "no .png label map, but its stream is labelled; add one, or index the shards without --labelled" in str(
        found[1]
    )


@pytest.mark.parametrize("name", bad_shards())
def test_every_kind_of_bad_sample(tmp_path, name):
    case = bad_shards()[name]
    root = write_folder(tmp_path / "x", {"s": (case.labelled, [(case.data, case.samples)])})
    file = "s-000000.tar"
    assert told(verify(root, deep=False)) == [(file, *fault) for fault in case.faults]
    found = list(verify(root))
    assert sorted(told(found)) == sorted((file, *fault) for fault in case.faults + case.deep_faults)
    for fault in found:
        assert fault.message.startswith(f"{file}: sample {fault.key!r}: ")
        assert "\n" not in str(fault)
        assert fault == Fault(**json.loads(json.dumps(fault.as_json())))


@pytest.mark.parametrize("name", not_tars())
def test_files_that_are_no_tar(tmp_path, name):
    root = write_folder(tmp_path / "x", {"s": (True, [(not_tars()[name], 1)])})
    faults = told(verify(root))
    assert faults[-1] == ("s-000000.tar", None, "shard_unreadable")


def test_a_missing_shard_a_folder_and_a_pipe(folder):
    shards = ShardIndex.load(folder).streams["labelled"].shards
    (folder / shards.file(0)).unlink()
    (folder / shards.file(1)).unlink()
    (folder / shards.file(1)).mkdir()
    (folder / shards.file(2)).unlink()
    os.mkfifo(folder / shards.file(2))
    assert told(verify(folder)) == [(shards.file(number), None, "shard_unreadable") for number in range(3)]


def test_size_checksum_and_count(folder):
    shards = ShardIndex.load(folder).streams["val"].shards
    data = bytearray((folder / shards.file(0)).read_bytes())
    data[130] ^= 1  # a header
    (folder / shards.file(0)).write_bytes(data)
    with (folder / shards.file(1)).open("ab") as file:
        file.write(bytes(512))
    edit_index(folder, lambda streams: streams["val"]["shards"][2].update(samples=9))
    messages = [str(fault) for fault in verify(folder)]
    assert "checksum" in messages[0]
    assert "header" in messages[1]
    assert "bytes where the index says" in messages[2]
    assert "1 samples where the index says 9" in messages[3]
    assert len(messages) == 4


def test_pixels_that_the_index_does_not_have(folder):
    labels, again = {}, {}
    assert list(verify(folder, labels=labels)) == []
    index = ShardIndex.load(folder)
    assert {name: tuple(counts[0]) for name, counts in labels.items()} == {
        name: stream.class_pixels for name, stream in index.streams.items() if stream.labelled
    }
    pixels = list(index.streams["val"].class_pixels)
    pixels[1] += 1
    edit_index(folder, lambda streams: streams["val"].update(class_pixels=pixels))
    (fault,) = verify(folder, labels=again)
    assert (fault.stream, fault.shard, fault.reason) == ("val", "index.json", "wrong_count")
    assert f"says {', '.join(map(str, pixels))}, but its label maps have {pixels[0]}, {pixels[1] - 1}" in str(fault)
    assert (again["val"] == labels["val"]).all()
    assert list(verify(folder, deep=False, labels=again)) == []


def test_pixels_of_a_damaged_stream_are_not_compared(folder):
    (folder / ShardIndex.load(folder).streams["val"].shards.file(0)).unlink()
    assert [fault.reason for fault in verify(folder)] == ["shard_unreadable"]


def test_a_shard_cut_short_says_where(folder):
    shards = ShardIndex.load(folder).streams["unlabelled"].shards
    path = folder / shards.file(0)
    path.write_bytes(path.read_bytes()[:1000])
    edit_index(folder, lambda s: s["unlabelled"]["shards"][0].update(bytes=1000, sha256=sha256(path)))
    faults = list(verify(folder))
    assert {fault.reason for fault in faults} == {"truncated"}
    assert "too early" in str(faults[0])


def test_keys_that_two_shards_share(tmp_path):
    shards = [
        (tar_bytes(sample("a") + sample("b")), 2),
        (tar_bytes(sample("b", 1) + sample("c")), 2),
        (tar_bytes(sample("b", 2) + sample("a", 3)), 2),
    ]
    root = write_folder(tmp_path / "x", {"s": (True, shards), "t": (True, shards[:1])})
    assert told(verify(root)) == [
        ("s-000001.tar", "b", "duplicate_key"),
        ("s-000002.tar", "b", "duplicate_key"),
        ("s-000002.tar", "a", "duplicate_key"),
    ]


@pytest.mark.slow  # three processes import torch
def test_workers_find_the_same(tmp_path):
    cases = [case for case in bad_shards().values() if case.labelled]
    root = write_folder(tmp_path / "x", {"s": (True, [(case.data, case.samples) for case in cases])})
    script = tmp_path / "check.py"
    script.write_text(
        "import json, sys\n"
        "from maskmatch_scale.data.tools.verify import verify\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps([fault.as_json() for fault in verify(sys.argv[1], workers=2, progress=True)]))\n"
    )
    ran = subprocess.run([sys.executable, script, root], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [fault.as_json() for fault in verify(root, workers=1)]


def test_shards_from_elsewhere(tmp_path):
    data = tar_bytes(sample("a"))
    root = write_folder(tmp_path / "x", {"s": (True, [(data, 1), (data, 1)])})
    index = ShardIndex.load(root)

    def fetch(file):
        if file.endswith("1.tar"):
            raise DataError("no answer")
        return (root / file).open("rb")

    assert told(verify("nowhere", index=index, open_shard=fetch)) == [("s-000001.tar", None, "shard_unreadable")]


def test_no_index_is_said_at_once(tmp_path):
    with pytest.raises(DataError, match=r"index\.json: no index"):
        verify(tmp_path)
