"""Cityscapes in its own layout, and with UniMatch's label maps and splits."""

from __future__ import annotations

import json

import numpy as np
import pytest

TRAIN = "aachen_000000_000019", "jena_000001_000019"
VAL = "frankfurt_000000_000294"
EXTRA = "augsburg_000000_000000"


def image(part, name):
    return f"leftImg8bit/{part}/{name.split('_')[0]}/{name}_leftImg8bit.png"


def label(part, name, end="labelIds"):
    return f"gtFine/{part}/{name.split('_')[0]}/{name}_gtFine_{end}.png"


def key(name):
    return f"{name}_leftImg8bit"


@pytest.fixture
def cityscapes(tree):
    for part, name in (("train", TRAIN[0]), ("train", TRAIN[1]), ("val", VAL), ("train_extra", EXTRA)):
        tree.image(image(part, name), size=(17, 2))
    for part, name in (("train", TRAIN[0]), ("val", VAL)):
        tree.label(label(part, name), np.arange(34).reshape(2, 17))
        tree.label(label(part, name, "instanceIds"), np.full((2, 17), 26001))
        tree.text(label(part, name, "polygons.json"), "{}")
    tree.label(label("train", TRAIN[1], "labelTrainIds"), [[*range(17)], [17, 18, *[255] * 15]])
    return tree


def test_ids_become_train_ids(cityscapes, run, shards, tmp_path):
    assert run("cityscapes", cityscapes.root, tmp_path / "out", "--train-extra")[0] == 0
    found = shards(tmp_path / "out")
    assert {name: set(samples) for name, samples in found.streams.items()} == {
        "labelled": {key(TRAIN[0]), key(TRAIN[1])},
        "unlabelled": {key(EXTRA)},
        "val": {key(VAL)},
    }
    by_id = dict(zip(range(34), found.label("val", key(VAL)).ravel().tolist()))
    evaluated = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    train_ids = dict(zip(evaluated, range(19)))
    assert by_id == {number: train_ids.get(number, 255) for number in range(34)}
    assert (
        found.label("labelled", key(TRAIN[1])).max(initial=0, where=found.label("labelled", key(TRAIN[1])) < 255) == 18
    )
    assert (found.index.classes[13], found.index.palette[13]) == ("car", (0, 0, 142))
    # PNG beside a label map becomes WebP without loss; alone it stays.
    assert set(found.streams["labelled"][key(TRAIN[0])]) == {"webp", "png"}
    assert (
        found.streams["unlabelled"][key(EXTRA)]["png"] == (cityscapes.root / image("train_extra", EXTRA)).read_bytes()
    )


def test_splits_of_unimatch(cityscapes, run, shards, tmp_path):
    few = cityscapes.text("labeled.txt", f"{image('train', TRAIN[0])} {label('train', TRAIN[0], 'labelTrainIds')}")
    many = cityscapes.text("unlabeled.txt", f"{image('train', TRAIN[1])} None", f"{image('train_extra', EXTRA)} None")
    code, _ = run("cityscapes", cityscapes.root, tmp_path / "out", "--split-labelled", few, "--split-unlabelled", many)
    found = shards(tmp_path / "out")
    assert (code, found.keys("labelled"), found.keys("unlabelled")) == (0, {key(TRAIN[0])}, {key(TRAIN[1]), key(EXTRA)})
    # The layout's own raw ids are used, whatever the split calls the label map.
    assert set(np.unique(found.label("labelled", key(TRAIN[0]))).tolist()) == {*range(19), 255}


def test_an_id_map_of_ones_own(cityscapes, run, shards, tmp_path):
    (cityscapes.root / label("train", TRAIN[1], "labelTrainIds")).unlink()
    cityscapes.label(label("train", TRAIN[1]), np.full((2, 17), 26))
    names = cityscapes.text("names.txt", "other", "vehicle")
    ids = {str(number): "other" for number in range(26)} | {"26": "vehicle"} | {str(n): "ignore" for n in range(27, 34)}
    id_map = cityscapes.text("ids.json", json.dumps(ids))
    options = ("--classes", names, "--id-map", id_map)
    assert run("cityscapes", cityscapes.root, tmp_path / "out", *options)[0] == 0
    found = shards(tmp_path / "out")
    assert found.index.classes == ("other", "vehicle")
    assert found.label("val", key(VAL)).ravel().tolist() == [0] * 26 + [1] + [255] * 7
    assert set(found.label("labelled", key(TRAIN[1])).ravel().tolist()) == {1}
