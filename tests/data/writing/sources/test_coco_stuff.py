"""COCO-Stuff as its own archives unpack, as mmsegmentation lays it out, and UniMatch's COCO."""

from __future__ import annotations

import numpy as np
import pytest

GAPS = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
USED = [value for value in range(182) if value not in GAPS]
NAME = "000000{0:06d}".format


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images/", "stuffthingmaps"), ("", "stuffthingmaps_trainval2017"), ("images/", "annotations")],
)
def test_182_ids_become_171_classes(tree, run, shards, tmp_path, images, labels):
    raw = np.array([[*USED, 255]])
    for number, part in ((1, "train2017"), (2, "train2017"), (3, "val2017")):
        tree.image(f"{images}{part}/{NAME(number)}.jpg", size=(172, 1))
        tree.label(f"{labels}/{part}/{NAME(number)}.png", raw)
    tree.image(f"{images}unlabeled2017/{NAME(4)}.jpg")
    few = tree.text("labeled.txt", f"train2017/{NAME(2)}.jpg masks/{NAME(2)}.png")
    options = ("--split-labelled", few, "--unlabeled2017")
    assert run("coco-stuff", tree.root, tmp_path / "out", *options)[0] == 0
    found = shards(tmp_path / "out")
    assert {name: set(samples) for name, samples in found.streams.items()} == {
        "labelled": {NAME(2)},
        "unlabelled": {NAME(1), NAME(4)},
        "val": {NAME(3)},
    }
    assert found.label("val", NAME(3)).ravel().tolist() == [*range(171), 255]
    # Ids of labels.txt of nightrome/cocostuff, less one.
    by_id = dict(zip(USED, found.index.classes))
    assert {number: by_id[number] for number in (0, 10, 12, 26, 89, 91, 156, 181)} == {
        0: "person", 10: "fire hydrant", 12: "stop sign", 26: "backpack", 89: "toothbrush", 91: "banner",
        156: "sky-other", 181: "wood",
    }  # fmt: skip


def test_a_value_of_no_class_is_named(tree, run, tmp_path):
    for part in ("train2017", "val2017"):
        tree.image(f"images/{part}/{NAME(1)}.jpg")
        tree.label(f"annotations/{part}/{NAME(1)}.png", 11)
    code, err = run("coco-stuff", tree.root, tmp_path / "out")
    assert (code, "value 11" in err, f"{NAME(1)}.png" in err) == (2, True, True)


def test_converted_label_maps_of_mmsegmentation(tree, run, shards, tmp_path):
    for part in ("train2017", "val2017"):
        tree.image(f"images/{part}/{NAME(1)}.jpg")
        tree.label(f"annotations/{part}/{NAME(1)}_labelTrainIds.png", 170)
    assert run("coco-stuff", tree.root, tmp_path / "out")[0] == 0
    assert shards(tmp_path / "out").values("val") == {NAME(1): 170}


def test_coco_of_unimatch_is_a_folder(tree, run, shards, tmp_path):
    files = {}
    for split, part, number in (("l", "train2017", 1), ("u", "train2017", 2), ("v", "val2017", 3)):
        tree.image(f"{part}/{NAME(number)}.jpg")
        tree.label(f"masks/{NAME(number)}.png", 80)
        files[split] = tree.text(f"{split}.txt", f"{part}/{NAME(number)}.jpg masks/{NAME(number)}.png")
    options = ("--split-labelled", files["l"], "--split-unlabelled", files["u"], "--split-val", files["v"])
    assert run("folder", tree.root, tmp_path / "out", *options, "--classes", "coco")[0] == 0
    found = shards(tmp_path / "out")
    assert (len(found.index.classes), found.index.classes[80]) == (81, "toothbrush")
    assert found.values("labelled") == {f"train2017_{NAME(1)}": 80}
    assert found.keys("unlabelled") == {f"train2017_{NAME(2)}"}
    assert found.values("val") == {f"val2017_{NAME(3)}": 80}
