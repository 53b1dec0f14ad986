"""COCO JSON: instances and panoptic, in the layouts of annotation tools, and what is refused or counted."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools")

CATEGORIES = [
    {"id": 7, "name": "tree", "supercategory": "things"},
    {"id": 2, "name": "car", "supercategory": "things"},
]
LEFT = [[0, 0, 6, 0, 6, 8, 0, 8]]
"""The left half of an image of 12 × 8 px."""
TOP = {"size": [8, 12], "counts": [0, *[2, 6] * 11, 2, 6]}
"""The two upper rows."""


def image(number, name, **more):
    return {"id": number, "file_name": name, "width": 12, "height": 8} | more


def annotation(number, image_id, category, segmentation, **more):
    row = {"id": number, "image_id": image_id, "category_id": category, "bbox": [6, 0, 6, 8]}
    return row | {"segmentation": segmentation, "iscrowd": 0} | more


def dataset(images=(), annotations=(), categories=CATEGORIES):
    return {"images": list(images), "annotations": list(annotations), "categories": categories}


@pytest.fixture
def street(tree):
    """Writes a JSON, and the images that it names, if they are not there, to `folder`."""

    def write(content, path="annotations/instances_default.json", folder="images"):
        for row in content["images"]:
            name = row["file_name"].replace("\\", "/").rsplit("/", 1)[-1]
            if not (tree.root / folder / name).exists():
                tree.image(f"{folder}/{name}")
        return tree.text(path, json.dumps(content))

    return write


PLAIN = dataset(
    [image(1, "a.jpg"), image(2, "b.jpg"), image(3, "c.jpg")],
    [annotation(10, 1, 2, LEFT), annotation(11, 1, 7, TOP), annotation(12, 3, 7, LEFT)],
)
OF_A = [[2] * 12] * 2 + [[1] * 6 + [0] * 6] * 6


def test_outlines_and_run_lengths_become_classes_in_the_order_of_ids(street, tree, run, shards, tmp_path):
    street(PLAIN)
    tree.image("images/d.jpg")
    code, err = run("coco", tree.root, tmp_path / "out")
    assert code == 0
    found = shards(tmp_path / "out")
    assert found.index.classes == ("background", "car", "tree")
    assert found.label("labelled", "a").tolist() == OF_A
    assert found.label("labelled", "c")[0].tolist() == [2] * 6 + [0] * 6
    assert not found.label("labelled", "b").any()
    assert found.keys("unlabelled") == {"d"}
    assert "note: 1 images have no annotation: labelled as all background" in err
    assert "note: 1 image files are named by no JSON, such as d.jpg: unlabelled" in err


def test_several_processes_draw_the_same(street, tree, run, tmp_path):
    street(PLAIN)
    for workers in (1, 2):
        assert run("coco", tree.root, tmp_path / str(workers), workers=workers)[0] == 0
    one, two = (sorted((tmp_path / name).glob("labelled*.tar")) for name in "12")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_crowd_is_ignored_but_objects_on_it_are_not(street, tree, run, shards, tmp_path):
    rows = [annotation(1, 1, 2, LEFT), annotation(2, 1, 7, TOP, iscrowd=1)]
    street(dataset([image(1, "a.jpg")], rows))
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "note: 1 annotations of crowds" in err) == (0, True)
    assert shards(tmp_path / "out").label("labelled", "a")[0].tolist() == [1] * 6 + [255] * 6
    assert "classes without an annotation" not in err


def test_masks_that_are_all_marked_as_crowds(street, tree, run, shards, tmp_path):
    street(dataset([image(1, "a.jpg")], [annotation(1, 1, 2, LEFT, iscrowd=1), annotation(2, 1, 7, TOP, iscrowd=1)]))
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "2 of 2 annotations are crowds (iscrowd)" in err, err.count("\n")) == (2, True, 1)
    assert run("coco", tree.root, tmp_path / "objects", "--crowds", "objects")[0] == 0
    assert shards(tmp_path / "objects").label("labelled", "a").tolist() == OF_A
    assert run("coco", tree.root, tmp_path / "ignored", "--crowds", "ignore")[0] == 0
    assert shards(tmp_path / "ignored").label("labelled", "a")[7].tolist() == [255] * 6 + [0] * 6


def test_a_box_without_segmentation_is_ignored_and_counted(street, tree, run, shards, tmp_path):
    street(dataset([image(1, "a.jpg")], [annotation(1, 1, 2, LEFT), annotation(2, 1, 7, [])]))
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "note: 1 annotations have a box, but no segmentation" in err) == (0, True)
    assert shards(tmp_path / "out").label("labelled", "a")[0].tolist() == [1] * 6 + [255] * 6


def test_outlines_of_two_points_are_counted(street, tree, run, tmp_path):
    street(dataset([image(1, "a.jpg")], [annotation(1, 1, 2, [*LEFT, [1, 1, 2, 2]])]))
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "note: 1 outlines of fewer than three points" in err) == (0, True)
    assert "note: classes without an annotation, which will never occur: tree" in err


@pytest.mark.parametrize(
    ("options", "classes", "row"),
    [
        (("--background", "ground"), ("ground", "car", "tree"), [1, 0]),
        (("--background", "ignore"), ("car", "tree"), [0, 255]),
        (("--background", "tree"), ("car", "tree"), [0, 1]),
        (("--classes", "tree", "car"), ("background", "tree", "car"), [2, 0]),
        (("--classes", "car", "background"), ("car", "background"), [0, 1]),
        (("--classes", "tree"), ("background", "tree"), [255, 0]),
        (("--classes", "tree", "--others", "background"), ("background", "tree"), [0, 0]),
        (("--classes", "tree", "--background", "ignore"), ("tree",), [255, 255]),
    ],
)
def test_which_classes_there_are(street, tree, run, shards, tmp_path, options, classes, row):
    street(PLAIN)
    if options[0] == "--classes":
        end = next((at for at in range(1, len(options)) if options[at].startswith("--")), len(options))
        options = ("--classes", tree.text("names.txt", *options[1:end]), *options[end:])
    code, err = run("coco", tree.root, tmp_path / "out", *options)
    found = shards(tmp_path / "out")
    assert (code, found.index.classes) == (0, classes)
    assert found.label("labelled", "a")[7].tolist() == [row[0]] * 6 + [row[1]] * 6
    left_out = options[0] == "--classes" and "car" not in classes
    assert ("1 categories that --classes leaves out" in err and "car (1)" in err) == left_out


def test_images_without_annotations_may_be_unlabelled(street, tree, run, shards, tmp_path):
    street(PLAIN)
    code, err = run("coco", tree.root, tmp_path / "out", "--unannotated", "unlabelled")
    assert (code, "note: 1 images have no annotation: unlabelled" in err) == (0, True)
    assert shards(tmp_path / "out").keys("unlabelled") == {"b"}


def test_coco_itself(street, tree, run, shards, tmp_path):
    street(PLAIN, "annotations/instances_train2017.json", "train2017")
    street(dataset([image(1, "v.jpg")], [annotation(1, 1, 7, LEFT)]), "annotations/instances_val2017.json", "val2017")
    tree.text("annotations/person_keypoints_val2017.json", "{}")
    tree.label("annotations/panoptic_val2017/v.png", 1)
    assert run("coco", tree.root, tmp_path / "out", "--dev", 1)[0] == 0
    found = shards(tmp_path / "out")
    assert found.keys("val") == {"v"}
    assert sorted(found.keys("labelled") | found.keys("dev")) == ["a", "b", "c"]
    code, err = run("coco", tree.root, tmp_path / "more", "--val", 1)
    assert (code, "--val 1: there are 1 samples in val already" in err) == (2, True)
    file = tree.root / "annotations/instances_val2017.json"
    assert run("coco", file, tmp_path / "one", "--images", tree.root / "val2017")[0] == 0
    assert run("coco", file, tmp_path / "two")[0] == 0
    assert shards(tmp_path / "one").keys("labelled") == shards(tmp_path / "two").keys("labelled") == {"v"}


def test_roboflow(street, tree, run, shards, tmp_path):
    root = {"id": 0, "name": "things", "supercategory": "none"}
    for number, part in enumerate(("train", "valid", "test")):
        rows = [annotation(1, 0, 7, LEFT), annotation(2, 0, 2, TOP)]
        content = dataset([image(0, f"{number}.jpg")], rows, [root, *CATEGORIES])
        street(content, f"{part}/_annotations.coco.json", part)
    code, err = run("coco", tree.root, tmp_path / "out")
    found = shards(tmp_path / "out")
    assert (code, found.index.classes) == (0, ("background", "car", "tree"))
    assert [found.keys(name) for name in ("labelled", "dev", "val")] == [{"0"}, {"1"}, {"2"}]
    assert err.count("category 'things' is left out") == 1
    assert "valid/_annotations.coco.json: 1 samples of dev" in err


@pytest.mark.parametrize("name", ["images\\a.jpg", "../../media/upload/1/a.jpg", "/data/upload/a.jpg", "C:\\x\\a.jpg"])
def test_label_studio_and_other_paths(street, tree, run, shards, tmp_path, name):
    street(dataset([image(0, name)], [annotation(0, 0, 2, LEFT)]), "result.json")
    assert run("coco", tree.root, tmp_path / "out")[0] == 0
    assert shards(tmp_path / "out").label("labelled", "a")[0].tolist() == [1] * 6 + [0] * 6


def test_images_of_other_data_sets_beside_a_json_are_not_taken(street, tree, run, shards, tmp_path):
    street(dataset([image(0, "photos/a.jpg")], [annotation(0, 0, 2, LEFT)]), "mine.json", "photos")
    tree.image("others/b.jpg")
    tree.image("photos/c.jpg")
    assert run("coco", tree.root / "mine.json", tmp_path / "out")[0] == 0
    found = shards(tmp_path / "out")
    assert (found.keys("labelled"), found.keys("unlabelled")) == ({"a"}, {"c"})


def test_images_in_other_folders_are_found_by_their_names(street, tree, run, shards, tmp_path):
    street(dataset([image(0, "a.jpg"), image(1, "b.jpg")], [annotation(0, 1, 2, LEFT)]))
    (tree.root / "images/deep").mkdir()
    (tree.root / "images/b.jpg").rename(tree.root / "images/deep/b.jpg")
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "1 images are found by their names alone, such as b.jpg" in err) == (0, True)
    assert shards(tmp_path / "out").keys("labelled") == {"a", "deep_b"}


def test_missing_images(street, tree, run, shards, tmp_path):
    street(PLAIN)
    (tree.root / "images/c.jpg").unlink()
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "1 of 3 images are not there, such as" in err, "c.jpg: cannot be read" in err) == (2, True, True)
    assert run("coco", tree.root, tmp_path / "out", "--skip-bad")[0] == 0
    for path in (tree.root / "images").iterdir():
        path.unlink()
    code, err = run("coco", tree.root, tmp_path / "none")
    assert (code, "its images are not found, not even a.jpg" in err, err.count("\n")) == (2, True, 1)


def test_shared_options(street, tree, run, shards, tmp_path):
    street(PLAIN)
    tree.bytes("images/d.jpg", (tree.root / "images/a.jpg").read_bytes())
    assert run("coco", tree.root, tmp_path / "out", "--max-side", 6)[0] == 0
    found = shards(tmp_path / "out")
    assert found.label("labelled", "a").shape == (4, 6)
    assert "unlabelled" not in found.index.streams  # d.jpg equals a.jpg
    split, val = tree.text("split.txt", "images/a.jpg", "c.jpg"), tree.text("val.txt", "b.jpg")
    assert run("coco", tree.root, tmp_path / "split", "--split-labelled", split, "--split-val", val)[0] == 0
    found = shards(tmp_path / "split")
    assert (found.keys("labelled"), found.keys("val")) == ({"a", "c"}, {"b"})
    code, err = run("coco", tree.root, tmp_path / "ids", "--id-map", split)
    assert (code, "--id-map: annotations have names" in err) == (2, True)


def test_other_annotations_are_another_data_set(street, tree, run, tmp_path):
    street(PLAIN)
    assert run("coco", tree.root, tmp_path / "out")[0] == 0
    street(PLAIN | {"annotations": PLAIN["annotations"][:2]})
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "files" in err) == (2, True)


def panoptic(tree, ids, segments):
    street = dataset([image(1, "a.jpg")], [{"image_id": 1, "file_name": "a.png", "segments_info": segments}])
    tree.image("val2017/a.jpg")
    tree.text("annotations/panoptic_val2017.json", json.dumps(street))
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    tree.save("annotations/panoptic_val2017/a.png", Image.fromarray(pixels))


def test_panoptic(tree, run, shards, tmp_path):
    ids = np.zeros((8, 12), np.int64)
    ids[:, 2:6], ids[:, 6:9], ids[:, 9:] = 5, 70_000, 16_777_215
    segments = [
        {"id": 5, "category_id": 2, "iscrowd": 0},
        {"id": 70_000, "category_id": 7, "iscrowd": 0},
        {"id": 16_777_215, "category_id": 7, "iscrowd": 1},
    ]
    panoptic(tree, ids, segments)
    assert run("coco", tree.root, tmp_path / "out", "--panoptic")[0] == 0
    found = shards(tmp_path / "out")
    assert found.index.classes == ("car", "tree")
    assert found.label("labelled", "a")[3].tolist() == [255] * 2 + [0] * 4 + [1] * 3 + [255] * 3
    code, err = run("coco", tree.root, tmp_path / "no", "--panoptic", "--background", "ground")
    assert (code, "--background ground: pixels of no segment" in err) == (2, True)
    code, err = run("coco", tree.root, tmp_path / "no")
    assert (code, "--panoptic takes panoptic_*.json" in err) == (2, True)
    panoptic(tree, ids, segments[:2])
    code, err = run("coco", tree.root, tmp_path / "no", "--panoptic")
    assert (code, "segment 16777215 is not in segments_info" in err) == (2, True)
    file = tree.root / "annotations/panoptic_val2017.json"
    code, err = run("coco", file, tmp_path / "no", "--segments", tree.root / "absent")
    assert (code, "--segments DIR is that of the PNGs" in err) == (2, True)
    (tree.root / "annotations/panoptic_val2017/a.png").unlink()
    code, err = run("coco", file, tmp_path / "gone")
    assert (code, "a.png: no such file" in err) == (2, True)


def of(**changes):
    """A data set of one annotation, changed."""
    return dataset([image(1, "a.jpg")], [annotation(9, 1, 2, LEFT) | changes])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (dataset([image(1, "a.jpg")]), "no annotation in it; images alone are written by `shards write folder`"),
        (of(segmentation=[]), "no annotation of it has a segmentation"),
        (of(segmentation=None, keypoints=[1, 2, 2]), "no annotation of it has a segmentation"),
        (of(image_id=5), "annotation 9: its image_id is that of no image"),
        (of(image_id=[1]), "annotation 9: its image_id is that of no image"),
        (of(category_id=5), "category_id 5, which is no category"),
        (of(segmentation="abc"), "annotation 9: segmentation is neither outlines nor run lengths"),
        (of(segmentation=[[0, 0, 6, 0, 6]]), "annotation 9: segmentation: an outline is a list of pairs"),
        (of(segmentation=[[0, 0, 6, 0, 6, 1e9]]), "annotation 9: segmentation: 1000000000.0 is no coordinate"),
        (of(segmentation=[[0, 0, 6, 0, 6, float("nan")]]), "nan is no coordinate"),
        (of(segmentation={"size": [8, 12], "counts": [3]}), "annotation 9: its run lengths are of [8, 12]"),
        (dataset([image(1, "a.jpg", height=None)], of()["annotations"]), "image a.jpg: height None"),
        (dataset([image(1, "a.jpg")] * 2, of()["annotations"]), "2 images have the id 1"),
        (dataset([image(1, "a.jpg", width=13)], of()["annotations"]), "a.jpg: 13 × 8 px, but its image"),
        (dataset([{"id": 1}]), "image 1 has no id or file_name"),
        (dataset([image(1, "a.jpg")], of()["annotations"], [{"id": 2}]), "category {'id': 2} has no id"),
        (of(iscrowd="0"), "annotation 9: iscrowd '0' is neither 0 nor 1"),
        (dataset([image(1, "a.jpg")]) | {"annotations": {"9": {}}}, "its `annotations` are no list"),
        (dataset([image(1, "")], of()["annotations"]), "image 1: '' is no name of a file"),
        (dataset([image(1, "a\0.jpg")], of()["annotations"]), "is no name of a file"),
        ({"shapes": []}, "it is labelme's"),
        ([], "it is a list"),
        ({"images": []}, "it names no image"),
    ],
)
def test_what_is_refused(street, tree, run, tmp_path, content, told):
    street(PLAIN)
    tree.text("annotations/instances_default.json", json.dumps(content))
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, told in err.replace("\n", " ")) == (2, True), err
    assert sum(line.startswith("maskmatch: error: ") for line in err.splitlines()) == 1


def test_a_split_file_names_images_of_one_name_by_their_paths(street, tree, run, shards, tmp_path):
    content = dataset(
        [image(1, "x/a.jpg"), image(2, "y/a.jpg"), image(3, "y/b.jpg")],
        [annotation(number, number, 2, LEFT) for number in (1, 2, 3)],
    )
    for row in content["images"]:
        tree.image(f"images/{row['file_name']}")
    tree.text("annotations/instances_default.json", json.dumps(content))
    val = tree.text("val.txt", "a.jpg\n")
    code, err = run("coco", tree.root, tmp_path / "out", "--split-val", val)
    assert (code, "2 images have this name, such as x/a.jpg and y/a.jpg; give the path" in err) == (2, True)
    val.write_text("x/a.jpg\nb.jpg\n")
    assert run("coco", tree.root, tmp_path / "out", "--split-val", val)[0] == 0
    found = shards(tmp_path / "out")
    assert (found.keys("val"), found.keys("labelled")) == ({"x_a", "y_b"}, {"y_a"})


def test_a_category_that_is_called_ignore_is_told(street, tree, run, shards, tmp_path):
    street(PLAIN | {"categories": [CATEGORIES[0], CATEGORIES[1] | {"name": "Ignore"}]})
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "annotations of the category Ignore (1) become ignored pixels" in err) == (0, True)
    assert shards(tmp_path / "out").index.classes == ("background", "tree")


def test_only_formats_that_no_json_names_are_left_out(street, tree, run, shards, tmp_path):
    street(dataset([image(1, "a.gif")], of()["annotations"]))
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "left out" in err) == (0, False)
    tree.image("images/b.gif")
    code, err = run("coco", tree.root, tmp_path / "more")
    assert (code, "are left out: 1 .gif" in err) == (0, True)


def test_files_that_cannot_be_read(tree, run, tmp_path):
    tree.text("broken.json", "{")
    tree.image("a.jpg")
    for source, told in (("absent", "no such file or folder"), ("broken.json", "not JSON"), ("a.jpg", "not JSON")):
        code, err = run("coco", tree.root / source, tmp_path / "out")
        assert (code, told in err, err.count("\n")) == (2, True, 1)
    (tree.root / "broken.json").unlink()
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "no COCO JSON in it" in err, err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--others", "cars"), "--others cars: ignore or background"),
        (("--others", "background", "--background", "ignore"), "--others background: there is no class"),
        (("--crowds", "no"), "--crowds no: ignore or objects"),
        (("--unannotated", "no"), "--unannotated no: background or unlabelled"),
        (("--images", "absent"), "--images absent: no such folder"),
        (("--classes", "voc"), "aeroplane, bicycle"),
    ],
)
def test_mistakes_in_options(street, tree, run, tmp_path, option, told):
    street(PLAIN)
    code, err = run("coco", tree.root, tmp_path / "out", *option)
    assert (code, told in err, err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_photos_that_exif_turns(street, tree, run, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    tree.image("images/a.jpg", exif=exif)
    street(of())
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, f"EXIF orientation {orientation}" in err) == ((2, True) if orientation == 3 else (0, False))


@pytest.mark.parametrize("options", [(), ("--tile", "16")])
def test_a_square_photo_that_exif_turns_fits_annotations_either_way(tree, run, tmp_path, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    tree.image("images/a.jpg", size=(24, 24), exif=exif)
    square = dataset([image(1, "a.jpg", width=24, height=24)], [annotation(9, 1, 2, LEFT)])
    tree.text("annotations/instances_default.json", json.dumps(square))
    code, err = run("coco", tree.root, tmp_path / "out", *options)
    assert (code, "EXIF orientation 6" in err, "--apply-exif" in err) == (2, True, True)
    assert run("coco", tree.root, tmp_path / "upright", "--apply-exif")[0] == 0


def test_without_pycocotools(street, tree, run, tmp_path, monkeypatch):
    street(PLAIN)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    code, err = run("coco", tree.root, tmp_path / "out")
    assert (code, "maskmatch_scale[coco]" in err, err.count("\n")) == (2, True, 1)
