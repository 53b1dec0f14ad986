"""ADE20K's scene parsing challenge in its own layout."""

from __future__ import annotations

import numpy as np
import pytest

ALL = np.arange(151).reshape(1, 151)


@pytest.fixture
def ade(tree):
    for name in ("ADE_train_00000001", "ADE_train_00000002"):
        tree.image(f"images/training/{name}.jpg", size=(151, 1))
        tree.label(f"annotations/training/{name}.png", ALL)
    tree.image("images/validation/ADE_val_00000001.jpg", size=(151, 1))
    tree.label("annotations/validation/ADE_val_00000001.png", ALL)
    return tree


def test_zero_is_ignored_and_the_others_move_down(ade, run, shards, tmp_path):
    assert run("ade20k", ade.root, tmp_path / "out", "--dev", 1)[0] == 0
    found = shards(tmp_path / "out")
    assert {name: len(samples) for name, samples in found.streams.items()} == {"labelled": 1, "dev": 1, "val": 1}
    assert found.label("val", "ADE_val_00000001").ravel().tolist() == [255, *range(150)]
    assert len(found.index.classes) == 150
    assert [found.index.classes[n] for n in (0, 7, 149)] == ["wall", "bed", "flag"]
    assert found.index.palette[149] == (92, 0, 255)


def test_converted_label_maps_and_splits_of_unimatch(ade, run, shards, tmp_path):
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        ade.label(f"annotations/{part}/{name}.png", [[*range(150), 255]])
    few = ade.text("l.txt", "images/training/ADE_train_00000001.jpg annotations/training/ADE_train_00000001.png")
    options = ("--split-labelled", few)
    code, err = run("ade20k", ade.root, tmp_path / "raw", *options)
    assert (code, "value 255" in err, "ADE_train_00000001.png" in err) == (2, True, True)
    assert run("ade20k", ade.root, tmp_path / "out", *options, "--converted")[0] == 0
    found = shards(tmp_path / "out")
    assert found.keys("unlabelled") == {"ADE_train_00000002"}
    assert found.label("labelled", "ADE_train_00000001").ravel().tolist() == [*range(150), 255]


def test_other_names_keep_the_label_values_of_the_data_set(ade, run, shards, tmp_path):
    """Without its table, value 0, which is ignored here, would be the first class."""
    names = ade.text("names.txt", *(f"class {number}" for number in range(150)))
    assert run("ade20k", ade.root, tmp_path / "out", "--classes", names)[0] == 0
    found = shards(tmp_path / "out")
    assert found.label("val", "ADE_val_00000001").ravel().tolist() == [255, *range(150)]
    assert found.index.classes[149] == "class 149"
    few = ade.text("few.txt", "ground", "tree")
    code, err = run("ade20k", ade.root, tmp_path / "few", "--classes", few)
    assert (code, "2 names for the 150 classes of source ade20k; --id-map FILE says" in err) == (2, True)
