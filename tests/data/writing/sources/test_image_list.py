"""Lists of images, as CSV and JSON lines."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def scans(tree):
    tree.text("names.txt", "paper", "ink")
    for number in range(6):
        tree.image(f"scans/{number}.jpg")
        tree.label(f"masks/{number}.png", number % 2)
    return tree


ROWS = [
    {"image": "scans/0.jpg", "label": "masks/0.png"},
    {"image": "scans/1.jpg", "label": "masks/1.png", "stream": "train"},
    {"image": "scans/2.jpg", "label": "masks/2.png", "stream": "dev"},
    {"image": "scans/3.jpg", "label": "masks/3.png", "stream": "val_night"},
    {"image": "scans/4.jpg", "label": "masks/4.png", "stream": "unlabelled"},
    {"image": "scans/5.jpg"},
]


def write(tree, file, rows):
    if file.endswith(".jsonl"):
        return tree.text(file, *map(json.dumps, rows))
    lines = (",".join(row.get(column, "") for column in ("image", "label", "stream")) for row in rows)
    return tree.text(file, "image,label,stream", *lines)


@pytest.mark.parametrize("file", ["list.csv", "list.jsonl"])
def test_streams_and_labels(scans, run, shards, tmp_path, file):
    listed = write(scans, file, ROWS)
    assert run("list", listed, tmp_path / "out", "--classes", scans.root / "names.txt")[0] == 0
    found = shards(tmp_path / "out")
    assert found.values("labelled") == {"scans_0": 0, "scans_1": 1}
    assert found.values("dev") == {"scans_2": 0}
    assert found.values("val_night") == {"scans_3": 1}
    assert found.keys("unlabelled") == {"scans_4", "scans_5"}


def test_other_columns_another_root_and_held_out_samples(scans, run, shards, tmp_path):
    lines = (f"{number},{number}.jpg,../masks/{number}.png" for number in range(6))
    listed = tree_list = scans.text("lists/list.csv", "id,file,mask", *lines)
    columns = ("--image-column", "file", "--label-column", "mask", "--root", scans.root / "scans")
    classes = ("--classes", scans.root / "names.txt")
    assert run("list", listed, tmp_path / "out", *columns, *classes, "--val", 2)[0] == 0
    found = shards(tmp_path / "out")
    assert (len(found.keys("labelled")), len(found.keys("val"))) == (4, 2)
    code, err = run("list", tree_list, tmp_path / "other", *classes)
    assert (code, "list.csv:2" in err, "id, file, mask" in err) == (2, True, True)


def test_absolute_paths(scans, run, shards, tmp_path):
    listed = scans.text("list.jsonl", json.dumps({"image": str(scans.root / "scans/0.jpg")}))
    assert run("list", listed, tmp_path / "out")[0] == 0
    (key,) = shards(tmp_path / "out").keys("unlabelled")
    assert key.endswith("scans_0")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "scans/5.jpg", "stream": "val"}, "has no label map"),
        ({"image": "scans/0.jpg"}, "twice"),
        ({"image": "scans/5.jpg", "label": "masks/5.png", "stream": "No 5"}, "no name of a stream"),
        ({"image": "scans/5.jpg", "stream": "night"}, "with and without"),
        ({"label": "masks/5.png"}, "no image"),
    ],
)
def test_rows_that_cannot_be_used(scans, run, tmp_path, row, message):
    rows = [
        {"image": "scans/0.jpg"},
        {"image": "scans/1.jpg", "label": "masks/1.png", "stream": "night"},
        row,
    ]
    listed = write(scans, "list.jsonl", rows)
    code, err = run("list", listed, tmp_path / "out", "--classes", scans.root / "names.txt")
    assert (code, message in err, "list.jsonl:3" in err, err.count("\n")) == (2, True, True, 1)


@pytest.mark.parametrize(
    ("file", "text"), [("list.jsonl", "{"), ("list.jsonl", "[1]"), ("list.txt", "a"), ("l.csv", "image")]
)
def test_lists_that_cannot_be_read(scans, run, tmp_path, file, text):
    code, err = run("list", scans.text(file, text), tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert run("list", scans.root / "nowhere.csv", tmp_path / "out")[0] == 2


def test_split_files_are_refused(scans, run, tmp_path):
    code, err = run("list", write(scans, "list.csv", ROWS), tmp_path / "out", "--split-val", "val.txt")
    assert (code, "stream" in err) == (2, True)
