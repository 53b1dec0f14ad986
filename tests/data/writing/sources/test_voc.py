"""Pascal VOC in its own layout, with SBD's labels, and as UniMatch has it."""

from __future__ import annotations

import pytest

TRAIN, AUG, VAL, REST = ("2007_000032", "2007_000039"), ("2008_000002",), ("2007_000033",), ("2009_000001",)


@pytest.fixture
def voc(tree):
    for number, name in enumerate((*TRAIN, *AUG, *VAL, *REST)):
        tree.image(f"JPEGImages/{name}.jpg")
        if name in TRAIN + VAL:
            tree.label(f"SegmentationClass/{name}.png", [[0] * 6 + [255] * 6, [number] * 12] * 4, mode="P")
    tree.label(f"SegmentationClassAug/{AUG[0]}.png", 20)
    tree.text("ImageSets/Segmentation/train.txt", *TRAIN)
    tree.text("ImageSets/Segmentation/val.txt", *VAL)
    return tree


def test_own_split(voc, run, shards, tmp_path):
    assert run("voc", voc.root, tmp_path / "out")[0] == 0
    found = shards(tmp_path / "out")
    assert {name: set(samples) for name, samples in found.streams.items()} == {"labelled": set(TRAIN), "val": set(VAL)}
    assert (len(found.index.classes), found.index.classes[15], found.index.palette[15]) == (
        21,
        "person",
        (192, 128, 128),
    )
    assert found.label("labelled", TRAIN[1]).tolist() == [[0] * 6 + [255] * 6, [1] * 12] * 4
    for name in TRAIN:
        assert found.streams["labelled"][name]["jpg"] == (voc.root / f"JPEGImages/{name}.jpg").read_bytes()


@pytest.mark.parametrize("listed", ["trainaug.txt", "train_aug.txt", None])
def test_augmented_labels_and_the_other_images(voc, run, shards, tmp_path, listed):
    if listed == "trainaug.txt":
        voc.text(f"ImageSets/Segmentation/{listed}", *TRAIN, *AUG)
    elif listed:
        voc.text(f"ImageSets/Segmentation/{listed}", *(f"/JPEGImages/{n}.jpg /x/{n}.png" for n in (*TRAIN, *AUG)))
    assert run("voc", voc.root, tmp_path / "out", "--aug", "--all-images")[0] == 0
    found = shards(tmp_path / "out")
    assert found.keys("labelled") == {*TRAIN, *AUG}
    assert found.keys("unlabelled") == set(REST)
    assert found.label("labelled", AUG[0]).max() == 20


def test_splits_of_unimatch(voc, run, shards, tmp_path):
    line = "JPEGImages/{0}.jpg SegmentationClass/{0}.png".format
    few = voc.text("1_16/labeled.txt", line(AUG[0]))
    many = voc.text("1_16/unlabeled.txt", *map(line, (*TRAIN, *REST)))
    options = ("--split-labelled", few, "--split-unlabelled", many)
    assert run("voc", voc.root, tmp_path / "out", *options)[0] == 0
    found = shards(tmp_path / "out")
    assert (found.keys("labelled"), found.keys("unlabelled"), found.keys("val")) == (
        set(AUG),
        {*TRAIN, *REST},
        set(VAL),
    )
    assert all(set(sample) == {"jpg"} for sample in found.streams["unlabelled"].values())
    # Without the file of the unlabelled ones, they are the rest of the training set.
    assert run("voc", voc.root, tmp_path / "rest", *options[:2])[0] == 0
    assert shards(tmp_path / "rest").keys("unlabelled") == set(TRAIN)


def test_a_split_with_a_label_that_is_not_there(voc, run, tmp_path):
    few = voc.text("labeled.txt", f"JPEGImages/{REST[0]}.jpg SegmentationClass/{REST[0]}.png")
    code, err = run("voc", voc.root, tmp_path / "out", "--split-labelled", few)
    assert (code, REST[0] in err, err.count("\n")) == (2, True, 1)
    assert not (tmp_path / "out").exists()


def test_a_held_out_image_is_never_trained_on(voc, run, shards, tmp_path):
    same = (voc.root / f"JPEGImages/{VAL[0]}.jpg").read_bytes()
    voc.bytes(f"JPEGImages/{TRAIN[0]}.jpg", same)
    voc.bytes(f"JPEGImages/{REST[0]}.jpg", same)
    code, err = run("voc", voc.root, tmp_path / "out", "--all-images")
    found = shards(tmp_path / "out")
    assert (code, found.keys("val"), found.keys("labelled")) == (0, set(VAL), {TRAIN[1]})
    assert "2 images dropped as duplicates" in err


@pytest.mark.parametrize(
    "missing", ["JPEGImages", "ImageSets/Segmentation/val.txt", "ImageSets/Segmentation/train.txt"]
)
def test_what_is_missing_is_named(voc, run, tmp_path, missing):
    (voc.root / missing).rename(voc.root / "elsewhere")
    code, err = run("voc", voc.root, tmp_path / "out")
    assert (code, missing in err, err.count("\n")) == (2, True, 1)
