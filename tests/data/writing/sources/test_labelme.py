"""Folders of labelme: shapes of every kind, labels, and what is refused or counted."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools")


def png(mask):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(mask, np.bool_)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}} | more


LEFT = shape("crack", [[0, 0], [6, 0], [6, 8], [0, 8]])


@pytest.fixture
def scan(tree):
    """Writes an image and its JSON."""

    def write(name, *shapes, **more):
        if not (tree.root / f"{name}.jpg").exists():
            tree.image(f"{name}.jpg")
        content = {"version": "5.5.0", "shapes": shapes, "imagePath": "x.jpg", "imageHeight": 8, "imageWidth": 12}
        tree.text(f"{name}.json", json.dumps(content | more))

    return write


@pytest.fixture
def names(tree):
    return tree.text("names.txt", "crack", "leaf")


def test_a_folder(tree, scan, names, run, shards, tmp_path):
    scan("day/a", LEFT, shape("leaf", [[8, 2], [12, 8]], "rectangle"), imageData="AAAA")
    scan("day/b")
    tree.image("night/c.jpg")
    code, err = run("labelme", tree.root, tmp_path / "out", "--classes", names)
    found = shards(tmp_path / "out")
    assert (code, found.index.classes) == (0, ("background", "crack", "leaf"))
    assert found.label("labelled", "day_a")[[1, 2]].tolist() == [
        [1] * 6 + [0] * 6,
        [1] * 6 + [0, 0, 2, 2, 2, 2],
    ]
    assert found.keys("unlabelled") == {"night_c"}
    assert "note: 1 images whose .json has no shape are labelled as all background" in err
    assert "note: 1 of 3 images have no .json: unlabelled" in err
    assert run("labelme", tree.root, tmp_path / "un", "--classes", names, "--unannotated", "unlabelled")[0] == 0
    assert shards(tmp_path / "un").keys("unlabelled") == {"day_b", "night_c"}


def test_rectangles_circles_and_masks(tree, scan, names, run, shards, tmp_path):
    mask = [[1, 0], [1, 1], [0, 1]]
    scan("a", shape("crack", [[4, 4], [4, 1]], "circle"), shape("leaf", [[10, 5], [11, 7]], "mask", mask=png(mask)))
    assert run("labelme", tree.root, tmp_path / "out", "--classes", names)[0] == 0
    label = shards(tmp_path / "out").label("labelled", "a")
    y, x = np.mgrid[:8, :12] + 0.5
    distance = np.hypot(x - 4, y - 4)
    assert (label[:, :9][distance[:, :9] < 2.4] == 1).all()
    assert not (label[:, :9][distance[:, :9] > 3.6]).any()
    assert label[5:, 10:].tolist() == [[2, 0], [2, 2], [0, 2]]


def test_shapes_without_area_are_counted(tree, scan, names, run, tmp_path):
    line, point = shape("crack", [[0, 0], [3, 3]], "line"), shape("leaf", [[0, 0]], "point")
    scan("a", LEFT, line, line, point, shape("leaf", [[0, 0], [3, 3]]))
    code, err = run("labelme", tree.root, tmp_path / "out", "--classes", names)
    assert (code, "note: 4 shapes have no area and are left out: 2 line, 1 point, 1 polygon" in err) == (0, True)


def test_a_type_that_is_no_text_is_a_shape_without_area(scan, names, tree, run, tmp_path):
    scan("a", LEFT, shape("leaf", [[1, 1], [5, 5], [1, 5]], ["box"]))
    code, err = run("labelme", tree.root, tmp_path / "out", "--classes", names)
    assert (code, "note: 1 shapes have no area and are left out: 1 ['box']" in err) == (0, True)


def test_labels_that_are_no_class(tree, scan, names, run, shards, tmp_path):
    rest = shape("rust", [[6, 0], [12, 0], [12, 8], [6, 8]])
    scan("a", LEFT, rest, shape("__ignore__", [[0, 0], [12, 2]], "rectangle"))
    code, err = run("labelme", tree.root, tmp_path / "out", "--classes", names)
    assert (code, f"labels that are not in --classes {names}: rust (1)" in err, err.count("\n")) == (2, True, 1)
    code, err = run("labelme", tree.root, tmp_path / "out", "--classes", names, "--unknown-as-ignore")
    assert (code, "become ignored pixels: rust (1)" in err) == (0, True)
    assert "classes without a shape, which will never occur: leaf" in err
    assert shards(tmp_path / "out").label("labelled", "a")[[0, 4]].tolist() == [[255] * 12, [1] * 6 + [255] * 6]
    code, err = run("labelme", tree.root, tmp_path / "none")
    assert (code, "labels found: crack (1), rust (1), __ignore__ (1)" in err) == (2, True)


@pytest.mark.parametrize(
    ("lines", "options", "classes", "row"),
    [
        (("__ignore__", "_background_", "crack"), (), ("_background_", "crack"), [1, 0]),
        (("crack", "background"), (), ("crack", "background"), [0, 1]),
        (("crack",), ("--background", "ground"), ("ground", "crack"), [1, 0]),
        (("crack",), ("--background", "ignore"), ("crack",), [0, 255]),
    ],
)
def test_the_class_of_the_background(tree, scan, run, shards, tmp_path, lines, options, classes, row):
    scan("a", LEFT)
    names = tree.text("names.txt", *lines)
    assert run("labelme", tree.root, tmp_path / "out", "--classes", names, *options)[0] == 0
    found = shards(tmp_path / "out")
    assert found.index.classes == classes
    assert found.label("labelled", "a")[0].tolist() == [row[0]] * 6 + [row[1]] * 6


def test_held_out_samples(tree, scan, names, run, shards, tmp_path):
    for number in range(6):
        scan(f"{number}", LEFT)
    assert run("labelme", tree.root, tmp_path / "out", "--classes", names, "--dev", 1, "--val", 2)[0] == 0
    found = shards(tmp_path / "out")
    assert [len(found.keys(name)) for name in ("labelled", "dev", "val")] == [3, 1, 2]


@pytest.mark.parametrize(
    ("shapes", "more", "told"),
    [
        ([{"points": []}], {}, "a.json: shape 0 has no label"),
        ([shape("crack", [[0, 0, 1]])], {}, "a.json: shape 0 (crack): points are no list of [x, y]"),
        ([shape("crack", [[0, 0], [1, 1e9], [2, 2]])], {}, "a.json: shape 0 (crack): points: 1000000000.0 is no"),
        ([shape("crack", [[0, 0], [1, 1]], "mask", mask="x")], {}, "a.json: shape 0 (crack): its mask is no PNG"),
        ([shape("crack", [[50, 0], [51, 1]], "mask", mask=png([[1]]))], {}, "its mask lies outside of the image"),
        ([LEFT], {"imageWidth": None}, "a.json: imageHeight 8 and imageWidth None are no size"),
        ([LEFT], {"imageWidth": 8, "imageHeight": 12}, "annotations of"),
    ],
)
def test_what_is_refused(tree, scan, names, run, tmp_path, shapes, more, told):
    scan("a", *shapes, **more)
    code, err = run("labelme", tree.root, tmp_path / "out", "--classes", names)
    errors = [line for line in err.splitlines() if line.startswith("maskmatch: error: ")]
    assert (code, len(errors), told in err) == (2, 1, True), err


def test_jsons_that_are_not_labelmes(tree, scan, names, run, tmp_path):
    tree.image("a.jpg")
    code, err = run("labelme", tree.root, tmp_path / "out", "--classes", names)
    assert (code, "no .json of labelme's beside an image" in err, err.count("\n")) == (2, True, 1)
    tree.text("instances.json", json.dumps({"images": [], "annotations": []}))
    code, err = run("labelme", tree.root, tmp_path / "out", "--classes", names)
    assert (code, "instances.json is a COCO JSON: `maskmatch shards write coco`" in err) == (2, True)
    tree.text("a.json", "[]")
    scan("b", LEFT)
    code, err = run("labelme", tree.root, tmp_path / "out", "--classes", names)
    assert code == 0
    assert "note: 1 .json files are not labelme's: they have no `shapes`, such as a.json: left out" in err
    assert "note: 1 .json files have the name of no image, such as instances.json: left out" in err
    tree.text("a.json", "{")
    code, err = run("labelme", tree.root, tmp_path / "other", "--classes", names)
    assert (code, "a.json: not JSON" in err, err.count("\n")) == (2, True, 1)
    tree.image("b.png")
    tree.text("a.json", "[]")
    code, err = run("labelme", tree.root, tmp_path / "other", "--classes", names)
    assert (code, "b.json: 2 images have its name" in err) == (2, True)
