"""Label maps from another folder, joined by key."""

import json

import numpy as np
import pytest

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.shards import second_labels, selection
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.shards.second_labels import LabelsElsewhere
from maskmatch_scale.recipe import DataRecipe
from tests.data import bad_shards, foreign_shards
from tests.data.faulty_server import Fault, FaultyServer


def write_labels(folder, shards, *, images=False):
    """A folder of ours whose samples are these keys, each label map of the number of its key."""
    folder.mkdir(exist_ok=True)
    entries = []
    for number, keys in enumerate(shards):
        members = [
            member for key in keys for member in bad_shards.sample(key, int(key) + 100) if images or ".png" in member[0]
        ]
        (folder / f"l-{number}.tar").write_bytes(bad_shards.tar_bytes(members))
        entries.append({"file": f"l-{number}.tar", "samples": len(keys)})
    content = {
        "source": "mine",
        "classes": ["ground", "square", "disc"],
        "palette": [[0, 0, 0], [255, 0, 0], [0, 0, 255]],
        "streams": {"labelled": {"labelled": True, "shards": entries}},
    }
    (folder / "index.json").write_text(json.dumps(content))
    return folder


def key(number):
    return f"{number:09d}"


@pytest.fixture
def archive(tmp_path):
    """img2dataset's: images 0 to 11 in three shards."""
    foreign_shards.img2dataset(tmp_path / "images", (3, 5, 4))
    return tmp_path / "images"


@pytest.fixture
def labels(tmp_path):
    return write_labels(tmp_path / "labels", [[key(7), key(40), key(1)], [key(11), key(0)]])


def join(images, labels, cache, strict=True, **data):
    data = DataRecipe(root=str(images), cache_dir=str(cache), **data)
    how = {"source": "mine", "cache": cache, "others_wait_s": 60.0, "strict": strict}
    return LabelsElsewhere(str(images), "unlabelled", data, str(labels), **how)


def check(stream):
    """Each chosen image has the label map of its key."""
    for number in stream.numbers.tolist():
        raw = stream.load(*stream.locate(number), lambda raw: raw)
        assert raw.key == key(number)
        assert raw.image == bad_shards.jpeg(number)
        assert raw.label == bad_shards.label_png(number + 100)


@pytest.mark.parametrize("images", [True, False])
def test_each_image_has_the_label_map_of_its_key(archive, tmp_path, images, monkeypatch):
    labels = write_labels(tmp_path / "labels", [[key(7), key(40), key(1)], [key(11), key(0)]], images=images)
    stream = join(archive, labels, tmp_path / "cache")
    assert stream.numbers.tolist() == [0, 1, 7, 11]
    assert stream.unmatched == f", 8 images without a label map in {labels}, 1 label maps without an image"
    check(stream)
    monkeypatch.setattr(second_labels, "_over_keys", None)  # keys are read once
    again = join(archive, labels, tmp_path / "cache")
    assert again.numbers.tolist() == [0, 1, 7, 11]
    check(again)


def test_other_labels_are_another_source(archive, labels, tmp_path):
    plain = ShardStream(str(archive), "unlabelled", labels=False)
    before = join(archive, labels, tmp_path / "cache")
    assert before.identities().tobytes() != plain.identities().tobytes()
    other = write_labels(tmp_path / "other", [[key(7), key(40), key(1), key(11), key(0)]])
    others = join(archive, other, tmp_path / "cache")
    assert others.identities().tobytes() != before.identities().tobytes()


def test_from_a_server_that_fails(archive, labels, tmp_path):
    faults = {"l-0.tar": [Fault(times=1, status=503)], "l-1.tar": [Fault(times=1, cut_after=2000)]}
    with FaultyServer(labels, faults) as server:
        stream = join(archive, server.url, tmp_path / "cache", fetch_timeout_s=1.0)
        check(stream)
        # A shard that is damaged in the cache is fetched again.
        damaged = next(
            file for file in (tmp_path / "cache").glob("url-*") if bad_shards.label_png(107) in file.read_bytes()
        )
        damaged.write_bytes(damaged.read_bytes().replace(bad_shards.label_png(107)[-40:], b"\0" * 40))

        def decoded(raw):
            if raw.label[-40:] == b"\0" * 40:
                raise BadSample("not_a_label", "damaged")
            return raw

        assert stream.load(*stream.locate(7), decoded).label == bad_shards.label_png(107)
        assert stream.take_figures().damaged == 1


def test_a_label_map_is_never_that_of_another_image(archive, labels, tmp_path, monkeypatch):
    """A shard that was replaced without a trace: of a stream of many, by an index without checksums."""
    monkeypatch.setattr(selection, "MOST_CHECKED_AT_START", 1)
    join(archive, labels, tmp_path / "cache")
    write_labels(labels, [[key(40), key(7), key(1)], [key(11), key(0)]])
    stream = join(archive, labels, tmp_path / "cache")
    with pytest.raises(DataError, match=rf"of '{key(7)}' was is that of '{key(40)}': .*; remove .*/labels-"):
        stream.load(*stream.locate(7), lambda raw: raw)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (
            [["000000050"]],
            r"source 'mine': labels=.*: no sample of .*images has the key of a label map \('000000011' here, '0",
        ),
        ([["000000001"], ["000000001"]], r"labels: key '000000001' is there twice, so labels cannot be matched"),
    ],
)
def test_what_cannot_be_joined(archive, tmp_path, shards, message):
    labels = write_labels(tmp_path / "labels", shards)
    for _ in range(2):
        with pytest.raises(DataError, match=message) as caught:
            join(archive, labels, tmp_path / "cache")
        assert "\n" not in str(caught.value)


def test_a_key_of_two_images(tmp_path, labels):
    foreign_shards.img2dataset(tmp_path / "images", (3, 5))
    foreign_shards.write_tar(tmp_path / "images/00001.tar", 5, 1)
    with pytest.raises(DataError, match="images: key '000000001' is there twice"):
        join(tmp_path / "images", labels, tmp_path / "cache")


def test_too_many_and_no_such_stream(archive, labels, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="stream 'labelled' is not in its index, which has unlabelled"):
        join(archive, archive, tmp_path / "cache")
    monkeypatch.setattr(second_labels, "MOST_LABELS", 4)
    with pytest.raises(DataError, match="labels: 5 label maps, and at most 4 are matched by keys"):
        join(archive, labels, tmp_path / "cache")


def test_a_shard_that_cannot_be_read(archive, labels, tmp_path):
    (labels / "l-1.tar").write_bytes(b"<html>" * 500)
    with pytest.raises(BadSample, match=r"l-1\.tar: not a tar"):
        join(archive, labels, tmp_path / "cache")
    stream = join(archive, labels, tmp_path / "cache", strict=False)
    assert np.array_equal(stream.numbers, [1, 7])
    check(stream)
