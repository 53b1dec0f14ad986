"""Folders of images: label maps of every kind, held-out samples, duplicates, bad samples, interruption."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def names(tree):
    return tree.text("names.txt", "ground", "crack", "edge")


def test_images_with_and_without_label_maps(tree, names, run, shards, tmp_path):
    photo = tree.image("images/a/one.jpg")
    tree.label("labels/a/one.png", 1)
    tree.image("images/b/two.JPG.jpg")
    tree.image("images/.hidden.jpg")
    tree.text("images/notes.txt", "not an image")
    assert run("folder", tree.root, tmp_path / "out", "--classes", names)[0] == 0
    found = shards(tmp_path / "out")
    assert found.values("labelled") == {"a_one": 1}
    assert found.streams["labelled"]["a_one"]["jpg"] == photo
    assert found.keys("unlabelled") == {"b_two_JPG"}
    assert found.index.classes == ("ground", "crack", "edge")
    assert found.index.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0))


def test_images_alone_need_no_classes(tree, run, shards, tmp_path):
    for number in range(3):
        tree.image(f"{number}.jpg")
    assert run("folder", tree.root, tmp_path / "out")[0] == 0
    found = shards(tmp_path / "out")
    assert (found.keys("unlabelled"), found.index.classes) == ({"0", "1", "2"}, ())


@pytest.mark.parametrize("place", ["", "photos", "photos/masks"])
def test_label_maps_that_lie_among_the_images(tree, names, run, shards, tmp_path, place):
    tree.image("photos/one.png")
    tree.image("photos/two.jpg")
    tree.label(f"{place}/one_mask.png".lstrip("/"), 2)
    arguments = ("--labels", place or ".", "--label-suffix", "_mask.png", "--images", "photos", "--classes", names)
    assert run("folder", tree.root, tmp_path / "out", *arguments)[0] == 0
    found = shards(tmp_path / "out")
    assert (found.values("labelled"), found.keys("unlabelled")) == ({"one": 2}, {"two"})


def test_label_maps_that_fit_nothing(tree, names, run, tmp_path):
    tree.image("images/one.jpg")
    tree.label("labels/one_mask.png", 1)
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names)
    assert (code, "--label-suffix _mask.png" in err) == (2, True)
    tree.label("labels/one.png", 1)
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names)
    assert (code, "note: 1 label maps" in err, "one_mask.png" in err) == (0, True, True)


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    height, width = values.shape
    unpacked = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :].reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(unpacked, axis=1))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["grey", "palette", "16 bits", "1 bit", "2 bits", "4 bits", "tiff"])
def test_values_of_every_kind_of_label_map(tree, names, run, shards, tmp_path, kind):
    tree.image("images/one.jpg")
    values = np.arange(96).reshape(8, 12) % 2
    if kind.endswith(("bit", "bits")) and kind != "16 bits":
        tree.bytes("labels/one.png", grey_png(values, int(kind[0])))
    elif kind == "16 bits":
        tree.save("labels/one.png", Image.fromarray(values.astype(np.uint16)))
    elif kind == "tiff":
        tree.label("labels/one.tif", values)
    else:
        tree.label("labels/one.png", values, mode="P" if kind == "palette" else None)
    suffix = ".tif" if kind == "tiff" else ".png"
    assert run("folder", tree.root, tmp_path / "out", "--classes", names, "--label-suffix", suffix)[0] == 0
    found = shards(tmp_path / "out")
    assert found.label("labelled", "one").tolist() == values.tolist()
    if kind == "grey":
        assert found.streams["labelled"]["one"]["png"] == (tree.root / "labels/one.png").read_bytes()


def test_an_id_map_of_16_bits(tree, names, run, shards, tmp_path):
    tree.image("images/one.jpg")
    tree.label("labels/one.png", [[24000, 26001, 7, 255] * 3] * 8)
    ids = tree.text("ids.yaml", "24000: crack", "26001: 2", "7: ignore", "255: 0")
    options = ("--classes", names, "--id-map", ids)
    assert run("folder", tree.root, tmp_path / "out", *options)[0] == 0
    assert shards(tmp_path / "out").label("labelled", "one").tolist() == [[1, 2, 255, 0] * 3] * 8
    tree.label("labels/one.png", [[24000, 8] * 6] * 8)
    code, err = run("folder", tree.root, tmp_path / "other", *options)
    assert (code, "one.png: value 8 at x=1, y=0" in err) == (2, True)
    assert run("folder", tree.root, tmp_path / "ignored", *options, "--unknown-as-ignore")[0] == 0
    assert shards(tmp_path / "ignored").label("labelled", "one").tolist() == [[1, 255] * 6] * 8


@pytest.mark.parametrize("lines", [["-1: 0"], ["7: 3"], ["7: road"], ["x: 0"], ["7: true"], ["7: [0]"], ["- 7"], ["{"]])
def test_mistakes_in_an_id_map(tree, names, run, tmp_path, lines):
    tree.image("images/one.jpg")
    tree.label("labels/one.png", 7)
    ids = tree.text("ids.yaml", *lines)
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names, "--id-map", ids)
    assert (code, "ids.yaml" in err, err.count("\n")) == (2, True, 1)
    assert not (tmp_path / "out" / "index.json").exists()


COLOURS = {
    "colours.txt": ("ground 10 20 30", "crack, 200, 0, 0", "ignore\t0 0 0"),
    "colours.yaml": ("ground: [10, 20, 30]", 'crack: "#c80000"', "ignore: [0, 0, 0]"),
    "colours.json": (
        '[{"name": "ground", "colour": [10, 20, 30]},',
        '{"name": "crack", "color": [200, 0, 0]}, {"name": "ignore", "colour": "#000000"}]',
    ),
}


@pytest.mark.parametrize("file", COLOURS)
def test_rgb_label_maps(tree, run, shards, tmp_path, file):
    classes = tree.text(file, *COLOURS[file])
    tree.image("images/one.jpg")
    rgb = np.array([[[10, 20, 30], [200, 0, 0], [0, 0, 0]] * 4] * 8, np.uint8)
    tree.save("labels/one.png", Image.fromarray(rgb))
    assert run("folder", tree.root, tmp_path / "out", "--classes", classes)[0] == 0
    found = shards(tmp_path / "out")
    assert (found.index.classes, found.index.palette) == (("ground", "crack"), ((10, 20, 30), (200, 0, 0)))
    assert found.label("labelled", "one").tolist() == [[0, 1, 255] * 4] * 8
    rgb[7, 11] = 9, 9, 9
    tree.save("labels/one.png", Image.fromarray(rgb))
    code, err = run("folder", tree.root, tmp_path / "other", "--classes", classes)
    assert (code, "one.png: colour (9, 9, 9) at x=11, y=7" in err) == (2, True)
    assert run("folder", tree.root, tmp_path / "ignored", "--classes", classes, "--unknown-as-ignore")[0] == 0
    assert shards(tmp_path / "ignored").label("labelled", "one")[7, 11] == 255


def test_rgb_label_maps_need_colours(tree, names, run, tmp_path):
    tree.image("images/one.jpg")
    tree.image("labels/one.png")
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names)
    assert (code, "RGB label map" in err, "one.png" in err) == (2, True, True)


@pytest.mark.parametrize("lines", [[], ["a", "a"], ["a 1 2 300"], ["a 1 2 3", "b 1 2 3"]])
def test_mistakes_in_classes(tree, run, tmp_path, lines):
    tree.image("images/one.jpg")
    tree.label("labels/one.png", 0)
    classes = tree.text("names.txt", *lines)
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", classes)
    assert (code, "names.txt" in err, err.count("\n")) == (2, True, 1)


def test_label_maps_need_names(tree, run, tmp_path):
    tree.image("images/one.jpg")
    tree.label("labels/one.png", 0)
    code, err = run("folder", tree.root, tmp_path / "out")
    assert (code, "--classes" in err) == (2, True)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    "kind", ["jpg", "grey.jpg", "webp", "png", "palette.png", "16bit.png", "rgba.png", "tif", "bmp"]
)
def test_how_images_are_stored(tree, names, run, shards, tmp_path, kind, labelled):
    path, rng = f"images/one.{kind}", np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (8, 12, 3), dtype=np.uint8))
    if kind.startswith("16bit"):
        image = Image.fromarray(rng.integers(0, 65535, (8, 12), dtype=np.uint16))
    elif kind.startswith(("grey", "palette", "rgba")):
        image = image.convert({"g": "L", "p": "P", "r": "RGBA"}[kind[0]])
    data = tree.save(path, image)
    key = f"one{'_' + kind.split('.')[0] if '.' in kind else ''}"
    if labelled:
        tree.label(f"labels/one{'.' + kind.split('.')[0] if '.' in kind else ''}.png", 1)
    classes = ("--classes", names) if labelled else ()
    assert run("folder", tree.root, tmp_path / "out", *classes)[0] == 0
    sample = dict(shards(tmp_path / "out").streams["labelled" if labelled else "unlabelled"][key])
    assert (sample.pop("png", None) is not None) == (labelled or kind.endswith("png"))
    ending = kind.split(".")[-1]
    if ending in ("jpg", "webp"):
        assert sample == {ending: data}
    elif labelled or ending != "png":
        expected = np.asarray(image) >> 8 if kind.startswith("16bit") else np.asarray(image.convert("RGB"))
        stored = np.asarray(Image.open(io.BytesIO(sample["webp"])).convert("RGB"))
        assert (stored == (np.stack([expected] * 3, axis=2) if expected.ndim == 2 else expected)).all()


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("more", [[], ["--max-side", "6"]])
def test_12_bit_data_in_16_bits_are_refused_when_they_are_written(tree, run, tmp_path, kind, more):
    values = np.random.default_rng(0).integers(0, 4096, (8, 12), dtype=np.uint16)
    tree.save(f"images/one.{kind}", Image.fromarray(values))
    code, err = run("folder", tree.root, tmp_path / "out", *more)
    assert code == 2
    assert re.search(rf"one\.{kind}: 16 bits a channel, but no value above 4095.*scale", err)


def test_large_images_are_shrunk_with_their_label_maps(tree, names, run, shards, tmp_path):
    small = tree.image("images/small.jpg", size=(50, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    tree.image("images/large.jpg", size=(200, 90), exif=exif)
    tree.label("labels/large.png", np.arange(18000).reshape(90, 200) // 9000)
    assert run("folder", tree.root, tmp_path / "out", "--classes", names, "--max-side", 100)[0] == 0
    found = shards(tmp_path / "out")
    assert found.streams["unlabelled"]["small"]["jpg"] == small
    with Image.open(io.BytesIO(found.streams["labelled"]["large"]["jpg"])) as image:
        assert (image.size, image.getexif()[0x0112]) == ((100, 45), 6)
    label = found.label("labelled", "large")
    assert (label.shape, label[0, 0], label[44, 99]) == ((45, 100), 0, 1)


def many(tree, count):
    for number in range(count):
        tree.image(f"images/{number:03d}.jpg")
        tree.label(f"labels/{number:03d}.png", number % 3)


def test_held_out_samples(tree, names, run, shards, tmp_path):
    many(tree, 40)
    options = ("--classes", names, "--val", "0.25", "--dev", 5)
    assert run("folder", tree.root, tmp_path / "a", *options)[0] == 0
    first = shards(tmp_path / "a")
    assert {name: len(s) for name, s in first.streams.items()} == {"labelled": 25, "val": 10, "dev": 5}
    assert sorted(key for s in first.streams.values() for key in s) == [f"{n:03d}" for n in range(40)]
    # Another seed, other samples; one sample more, nearly the same ones.
    assert run("folder", tree.root, tmp_path / "b", *options, "--split-seed", 1)[0] == 0
    assert shards(tmp_path / "b").keys("val") != first.keys("val")
    many(tree, 41)
    assert run("folder", tree.root, tmp_path / "c", *options)[0] == 0
    assert len(shards(tmp_path / "c").keys("val") & first.keys("val")) >= 9


def test_held_out_folders(tree, names, run, shards, tmp_path):
    for part in ("train", "val", "test"):
        tree.image(f"images/{part}/x.jpg")
        tree.label(f"labels/{part}/x.png", 0)
    tree.image("images/more/y.jpg")
    assert run("folder", tree.root, tmp_path / "out", "--classes", names, "--dev", "val", "--val", "test/")[0] == 0
    found = {name: set(samples) for name, samples in shards(tmp_path / "out").streams.items()}
    assert found == {"labelled": {"train_x"}, "dev": {"val_x"}, "val": {"test_x"}, "unlabelled": {"more_y"}}


@pytest.mark.parametrize("option", [("--val", "2"), ("--val", "1.5"), ("--dev", "tenth"), ("--dev", "-1")])
def test_more_than_can_be_held_out(tree, names, run, tmp_path, option):
    many(tree, 2)
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names, *option)
    assert (code, option[0] in err, err.count("\n")) == (2, True, 1)


def test_the_order_is_shuffled_by_a_seed(tree, run, tmp_path, contents):
    from maskmatch_scale.data.shards.reading import ShardStream

    for number in range(30):
        tree.image(f"{number:03d}.jpg")
    orders = {}
    for seed in (0, 1, -1):
        assert run("folder", tree.root, tmp_path / f"{seed}", "--shuffle-seed", seed)[0] == 0
        stream = ShardStream(tmp_path / f"{seed}", "unlabelled")
        orders[seed] = [stream[n].key for n in range(30)]
    assert orders[-1] == sorted(orders[-1]) == sorted(orders[0]) == sorted(orders[1])
    assert len({tuple(order) for order in orders.values()}) == 3
    assert run("folder", tree.root, tmp_path / "again")[0] == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "0")


def test_equal_images_are_written_once(tree, names, run, shards, tmp_path):
    many(tree, 6)
    same = (tree.root / "images/000.jpg").read_bytes()
    for path in ("images/005.jpg", "images/copy.jpg", "images/z/copy.jpg"):
        tree.bytes(path, same)
    tree.bytes("images/longer.jpg", same + b"\0")
    options = ("--classes", names)
    code, err = run("folder", tree.root, tmp_path / "out", *options)
    found = shards(tmp_path / "out")
    assert (code, found.keys("labelled"), found.keys("unlabelled")) == (0, {f"{n:03d}" for n in range(5)}, {"longer"})
    assert "3 images dropped" in err
    lines = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    assert {(line["stream"], line["image"]) for line in lines} == {
        ("labelled", "images/005.jpg"), ("unlabelled", "images/copy.jpg"), ("unlabelled", "images/z/copy.jpg"),
    }  # fmt: skip
    assert all(line["same_as"] == {"stream": "labelled", "image": "images/000.jpg"} for line in lines)
    assert run("folder", tree.root, tmp_path / "all", *options, "--keep-duplicates")[0] == 0
    assert len(shards(tmp_path / "all").keys("unlabelled")) == 3


def spoil(tree):
    """Six labelled samples, of which only `0` is sound."""
    for number in range(6):
        tree.image(f"images/{number}.jpg")
        tree.label(f"labels/{number}.png", 1)
    tree.bytes("images/1.jpg", (tree.root / "images/1.jpg").read_bytes()[:-40])
    tree.bytes("images/2.jpg", b"")
    tree.label("labels/3.png", np.ones((8, 11)))
    tree.label("labels/4.png", 3)
    tree.bytes("labels/5.png", b"\x89PNG\r\n\x1a\n")
    return {"1": "not_an_image", "2": "empty", "3": "label_size", "4": "label_value", "5": "not_a_label"}


def test_bad_samples(tree, names, run, shards, tmp_path):
    reasons = spoil(tree)
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names, "--shuffle-seed", -1)
    assert (code, "1.jpg" in err, "--skip-bad" in err, err.count("\n")) == (2, True, True, 1)
    # What was begun goes on.
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names, "--shuffle-seed", -1, "--skip-bad")
    assert (code, "5 bad samples left out" in err) == (0, True)
    assert shards(tmp_path / "out").keys("labelled") == {"0"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {str(line["item"]): line["reason"] for line in lines} == reasons
    assert all(f"/{line['item']}." in line["message"] for line in lines)


def test_nothing_but_bad_samples(tree, names, run, tmp_path):
    spoil(tree)
    (tree.root / "images/0.jpg").write_bytes(b"no image")
    code, err = run("folder", tree.root, tmp_path / "out", "--classes", names, "--skip-bad")
    assert (code, "'labelled'" in err, "skipped.jsonl" in err) == (2, True, True)


def test_a_restart_with_other_files_is_refused(tree, run, tmp_path):
    tree.image("one.jpg")
    tree.bytes("two.jpg", b"no image")
    assert run("folder", tree.root, tmp_path / "out")[0] == 2
    (tree.root / "two.jpg").unlink()
    code, err = run("folder", tree.root, tmp_path / "out")
    assert (code, "2 samples" in err, "1 samples" in err) == (2, True, True)


def test_links_are_followed_but_not_in_circles(tree, run, shards, tmp_path):
    tree.image("a/one.jpg")
    type(tree)(tmp_path / "elsewhere").image("two.jpg", size=(5, 5))
    (tree.root / "linked").symlink_to(tmp_path / "elsewhere")
    (tree.root / "a/round").symlink_to(tree.root)
    (tree.root / "broken.jpg").symlink_to(tree.root / "nowhere.jpg")
    code, err = run("folder", tree.root, tmp_path / "out", "--skip-bad")
    assert (code, "1 bad samples" in err) == (0, True)
    assert shards(tmp_path / "out").keys("unlabelled") == {"a_one", "linked_two"}


def test_nothing_there(tree, run, tmp_path):
    tree.text("names.txt", "a")
    assert run("folder", tree.root, tmp_path / "out")[0] == 2
    assert run("folder", tree.root / "nowhere", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()


def test_a_killed_writer_ends_with_the_same_bytes(tree, names, run, shards, contents, tmp_path):
    many(tree, 60)
    for number in (3, 30, 31, 59):
        tree.bytes(f"images/{number:03d}.jpg", b"damaged")
    same = (tree.root / "images/010.jpg").read_bytes()
    tree.bytes("images/011.jpg", same)
    options = ["--classes", str(names), "--skip-bad", "--samples-per-shard", "2"]
    arguments = ["folder", str(tree.root), "OUT", *options]
    assert run(*(str(tmp_path / "whole") if a == "OUT" else a for a in arguments), workers=2)[0] == 0
    # One image that never comes: the writer waits for it until it is killed.
    late = tree.root / "images/040.jpg"
    data = late.read_bytes()
    late.unlink()
    os.mkfifo(late)
    broken = tmp_path / "broken"
    command = [sys.executable, "-m", "maskmatch_scale", "shards", "write", *arguments, "--workers", "1"]
    process = subprocess.Popen([str(broken) if a == "OUT" else a for a in command], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(broken.glob("labelled-*.tar"))) < 3:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "index.json").exists()
    late.unlink()
    late.write_bytes(data)
    done = {path.name: path.stat().st_mtime_ns for path in broken.glob("labelled-*.tar")}
    assert run(*(str(broken) if a == "OUT" else a for a in arguments))[0] == 0
    assert contents(broken) == contents(tmp_path / "whole")
    assert all((broken / name).stat().st_mtime_ns == time_ns for name, time_ns in done.items())
    # Three copies of `damaged` are duplicates of the first, which alone is left out as bad.
    assert len(shards(broken).keys("labelled")) == 55
