"""Label maps and images that are not found: what is said of the files that are there."""

from __future__ import annotations

import pytest

LABELME, COCO = '{"shapes": []}', '{"images": [], "annotations": []}'


@pytest.fixture
def names(tree):
    for number in range(4):
        tree.image(f"images/{number}.jpg")
    return tree.text("names.txt", "ground", "crack")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"images/{}.json": LABELME}, "4 .json files, such as images/0.json: labelme? use `maskmatch shards write"),
        (
            {"annotations/instances.json": COCO},
            "annotations/instances.json is a COCO JSON: use `maskmatch shards write",
        ),
        ({"masks/{}.jpg": "image"}, "masks: 4 files end in .jpg: JPEG changes the values of label maps, write PNGs"),
        ({"masks/{}_mask.png": "label"}, "masks: 4 files end in _mask.png: --label-suffix _mask.png"),
        ({"masks/{}.tif": "label"}, "masks: 4 files end in .tif: --label-suffix .tif"),
        ({"images/{}_mask.png": "label"}, "--labels images --label-suffix _mask.png"),
        ({"gt/{}.png": "label"}, "gt: 4 files end in .png: --labels gt\n"),
        ({"gt/{}-seg.png": "label"}, "gt: 4 files end in -seg.png: --labels gt --label-suffix -seg.png"),
        ({"labels/{}.txt": "0 1 1"}, "labels holds 4 .txt"),
        ({"labels/day/{}.png": "label"}, "labels/day: 4 files end in .png: --labels labels/day\n"),
        ({}, "there is no folder labels or masks or annotations; --labels and --label-suffix say where"),
    ],
)
def test_what_is_there_instead_of_label_maps(tree, names, run, tmp_path, files, told):
    for pattern, content in files.items():
        for path in sorted({pattern.format(number) for number in range(4)}):
            if content in ("image", "label"):
                getattr(tree, content)(path, *((1,) if content == "label" else ()))
            else:
                tree.text(path, content)
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names)
    assert (code, told in err, err.count("\n")) == (2, True, 1), err
    assert not (tmp_path / "out").exists()


def test_a_hint_is_followed(tree, names, run, shards, tmp_path):
    tree.image("images/deep/x.jpg")
    for name in ("0", "1", "2", "3", "deep/x"):
        tree.label(f"gt/{name}_m.png", 1)
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names)
    assert (code, "gt: 5 files end in _m.png: --labels gt --label-suffix _m.png" in err) == (2, True)
    options = ("--labels", "gt", "--label-suffix", "_m.png")
    assert run("folder", tree.root, tmp_path / "out", "--classes", names, *options)[0] == 0
    assert len(shards(tmp_path / "out").keys("labelled")) == 5


def test_label_maps_in_other_folders_than_their_images(tree, run, tmp_path):
    tree.image("images/deep/x.jpg")
    tree.label("labels/x.png", 1)
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", tree.text("names.txt", "ground", "crack"))
    assert (code, "but lie in other folders than their images, such as labels/x.png" in err) == (2, True)


def test_folders_of_the_same_names(tree, run, tmp_path):
    for number in range(2):
        tree.image(f"rgb/{number}.jpg")
        tree.label(f"gt/{number}.png", 1)
    names = tree.text("names.txt", "ground", "crack")
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names)
    assert (code, "gt and rgb have 2 images of the same names: --images and --labels say which" in err) == (2, True)


def test_images_alone_are_written_but_not_without_a_word(tree, names, run, shards, tmp_path):
    tree.image("masks/0.jpg")
    code, err = run("folder", tree.root, tmp_path / "out")
    assert (code, "note: all images are unlabelled: no label map is found for 4 images" in err) == (0, True)
    tree.label("masks/1.png", 1)
    code, err = run("folder", tree.root, tmp_path / "named", "--classes", names)
    assert (code, "note: 3 of 4 images have no label map: unlabelled" in err) == (0, True)
    assert len(shards(tmp_path / "named").keys("unlabelled")) == 3
    code, err = run("folder", tree.root, tmp_path / "unnamed")
    assert (code, "label maps need names" in err) == (2, True)


def test_formats_that_are_left_out(tree, run, tmp_path):
    for name in ("a.gif", "b.GIF", "c.heic", "d.nii.gz", "e.txt"):
        tree.text(name, "")
    told = "files of formats that are not read as images here are left out: 2 .gif, 1 .heic, 1 .nii.gz"
    code, err = run("folder", tree.root, tmp_path / "out")
    assert (code, told in err, err.count("\n")) == (2, True, 1)
    tree.image("f.jpg")
    code, err = run("folder", tree.root, tmp_path / "out")
    assert (code, f"note: {told}\n" in err) == (0, True)


def test_a_list_without_label_maps(tree, names, run, tmp_path):
    listed = tree.text("list.csv", "image,mask", "images/0.jpg,masks/0.png")
    code, err = run("list", listed, tmp_path / "out", "--classes", names)
    assert (code, "no row has a label map in column 'label'" in err, "image, mask" in err) == (2, True, True)
    assert run("list", listed, tmp_path / "out")[0] == 0
