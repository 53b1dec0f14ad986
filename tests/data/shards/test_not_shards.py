"""Raw data given for a shard folder: the message names the command that reads it."""

import pytest

from maskmatch_scale.cli.shards import shards_app  # noqa: F401 - registers the sources
from maskmatch_scale.cli.shards_write import write_app
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.not_shards import not_shards

LAYOUTS = {
    "voc": ["JPEGImages/a.jpg", "SegmentationClass/a.png"],
    "voc ": ["VOC2012/JPEGImages/a.jpg"],
    "cityscapes": ["leftImg8bit/train/x/a.png", "gtFine/train/x/a.png"],
    "ade20k": ["images/training/a.jpg", "annotations/training/a.png"],
    "coco-stuff": ["images/train2017/a.jpg", "stuffthingmaps/train2017/a.png"],
    "coco": ["images/a.jpg", "annotations/instances.json"],
    "coco ": ["a.jpg", "_annotations.coco.json"],
    "labelme": ["a.jpg", "a.json", "b.jpg"],
    "folder": ["images/a.jpg", "masks/a.png"],
    "folder ": ["a.jpg", "b.TIF"],
}


@pytest.mark.parametrize("source", LAYOUTS)
def test_folders(tmp_path, source):
    for path in LAYOUTS[source]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(DataError) as caught:
        load_index(str(tmp_path))
    said = str(caught.value)
    assert said.startswith(f"data.root={tmp_path}: not a shard folder")
    assert f"`maskmatch shards write {source.strip()} {tmp_path} OUT" in said
    with pytest.raises(DataError) as caught:
        load_index(str(tmp_path), key="")
    assert str(caught.value).startswith(f"{tmp_path}: not a shard folder")


def test_the_sources_are_commands():
    commands = {command.name for command in write_app.registered_commands}
    named = {source.strip() for source in LAYOUTS} | {"list"}
    assert named <= commands


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.tar", "`maskmatch shards index {path} OUT`"),
        ("a.zip", "unpack it"),
        ("a.tar.gz", "unpack it"),
        ("a.JPG", "`maskmatch shards write folder {path.parent} OUT"),
        ("a.csv", "`maskmatch shards write list {path} OUT"),
        ("a.bin", "a file, not a shard folder"),
    ],
)
def test_files(tmp_path, name, words):
    path = tmp_path / name
    path.touch()
    with pytest.raises(DataError) as caught:
        load_index(str(path))
    assert str(caught.value).startswith(f"data.root={path}: ")
    assert words.format(path=path) in str(caught.value)


def test_a_shard_folder_within_is_named(shapes, tmp_path):
    (tmp_path / "shapes").symlink_to(shapes)
    assert not_shards(tmp_path) == f"not a shard folder, but there is one in it: {tmp_path / 'shapes'}"


def test_what_is_unknown_keeps_the_general_message(tmp_path):
    assert not_shards(tmp_path) is None
    (tmp_path / "labelled-000000.tar").touch()
    with pytest.raises(DataError, match=r"no index; looked for .* an interrupted `maskmatch shards write`"):
        load_index(str(tmp_path))
