"""Huge images cut into tiles: where tiles lie, what they hold, what is left out, and interruption."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.decode import decode_image
from maskmatch_scale.data.writing import merge_shards
from maskmatch_scale.data.writing.protocol import LeftOut
from maskmatch_scale.data.writing.sources.label_rule import LabelRule
from maskmatch_scale.data.writing.sources.read_files import FileItem, ReadFiles
from maskmatch_scale.data.writing.sources.read_tiles import ReadTiles
from maskmatch_scale.data.writing.sources.tiles import TileItem, Tiling

rasterio = pytest.importorskip("rasterio")


@pytest.fixture
def names(tree):
    return tree.text("names.txt", "ground", "crack", "edge")


def noise(height, width, seed=0, high=255, **options):
    return np.random.default_rng(seed).integers(1, high, (height, width, 3), dtype=np.uint8, **options)


def tiff(path, bands, **options):
    """A tiled TIFF of bands (C, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    shape = {"count": count, "height": height, "width": width, "dtype": bands.dtype}
    layout = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"} | options
    with (
        warnings.catch_warnings(action="ignore"),
        rasterio.open(path, "w", driver="GTiff", **shape, **layout) as file,
    ):
        file.write(bands)
    return path


def png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@given(st.integers(1, 3000), st.integers(16, 400), st.data())
def test_tiles_cover_every_pixel_and_have_one_size(side, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    tiling = Tiling(tile, overlap)
    starts = tiling.starts(side)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    length = min(side, tile)
    assert starts[-1] + length == side
    steps = np.diff(starts)
    assert all(steps[:-1] == tile - overlap)
    assert all(steps <= tile - overlap)


@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.integers(16, 40))
def test_an_image_is_cut_where_it_is_larger(size, tile):
    file = FileItem("k", "i", None)
    found = Tiling(tile).cut(file, size)
    if max(size) <= tile:
        assert found == [file]
        return
    covered = np.zeros(size, int)
    for item in found:
        covered[item.window] += 1
        assert covered[item.window].shape == (min(size[0], tile), min(size[1], tile))
    assert covered.min() == 1
    assert [item.is_last for item in found] == [False] * (len(found) - 1) + [True]
    assert len({item.key for item in found}) == len(found)


def cut_at(key, array):
    """The part of an array from which a tile of 32 px was cut, by its key."""
    top, left = map(int, re.fullmatch(r".*_y(\d{6})_x(\d{6})", key).groups())
    return array[top : top + 32, left : left + 32]


@pytest.mark.parametrize("kind", ["tif", "png", "jpg", "webp"])
def test_tiles_are_the_pixels_and_the_labels_of_their_place(tree, names, run, shards, tmp_path, kind):
    pixels, values = noise(70, 100), noise(70, 100, 1, high=3)[..., 0]
    if kind == "tif":
        tiff(tree.root / "images" / "a.tif", pixels.transpose(2, 0, 1))
        tiff(tree.root / "labels" / "a.tif", values[None])
        options = ("--label-suffix", ".tif")
    else:
        (tree.root / "images").mkdir(parents=True)
        how = {"quality": 95} if kind == "jpg" else {"lossless": True}
        Image.fromarray(pixels).save(tree.root / "images" / f"a.{kind}", **how)
        png(tree.root / "labels" / "a.png", values)
        options = ()
    small = tree.image("images/small.jpg")
    tree.label(f"labels/small.{'tif' if kind == 'tif' else 'png'}", 1)
    arguments = ("folder", tree.root, tmp_path / "out", "--classes", names, "--tile", 32, "--overlap", 8, *options)
    assert run(*arguments)[0] == 0
    found = shards(tmp_path / "out")
    tops, lefts = (0, 24, 38), (0, 24, 48, 68)
    assert found.keys("labelled") == {"small", *(f"a_y{y:06d}_x{x:06d}" for y in tops for x in lefts)}
    samples = found.streams["labelled"]
    assert samples["small"]["jpg"] == small
    with Image.open(tree.root / "images" / f"a.{kind}") as image:
        pixels = np.asarray(image.convert("RGB"))
    for key in found.keys("labelled") - {"small"}:
        assert np.array_equal(found.label("labelled", key), cut_at(key, values))
        extension = "jpg" if kind == "jpg" else "webp"
        decoded = decode_image(samples[key][extension], key).permute(1, 2, 0).numpy()
        if kind == "jpg":
            assert np.abs(decoded.astype(int) - cut_at(key, pixels)).mean() < 30  # noise is hard for JPEG
            assert np.corrcoef(decoded.ravel(), cut_at(key, pixels).ravel())[0, 1] > 0.9
        else:
            assert np.array_equal(decoded, cut_at(key, pixels))
    assert (found.index.settings["tile"], found.index.settings["overlap"]) == (32, 8)


def test_tiles_of_bands_keep_all_their_bits(tree, names, run, shards, tmp_path):
    bands = np.random.default_rng(0).integers(1, 3000, (5, 70, 100), dtype=np.uint16)
    bands[:, :40, :40] = 0
    values = noise(70, 100, 1, high=3)[..., 0]
    tiff(tree.root / "images" / "a.tif", bands, nodata=0)
    png(tree.root / "labels" / "a.png", values)
    arguments = ("folder", tree.root, tmp_path / "out", "--classes", names, "--tile", 32)
    plain = ("folder", tree.root, tmp_path / "plain", *arguments[3:])
    assert run(*plain)[0] == 2  # bands would be lost
    code, said = run(*arguments, "--bands", "blue,green,red,nir,-", "--value-range", "0:3000")
    assert code == 0
    assert "1 tiles left out that have no data" in said
    found = shards(tmp_path / "out")
    samples = found.streams["labelled"]
    assert len(samples) == 3 * 4 - 1
    values[:40, :40] = 255
    for key, sample in samples.items():
        with Image.open(io.BytesIO(sample["tif"])) as image:
            for page in range(4):
                image.seek(page)
                assert np.array_equal(np.asarray(image), cut_at(key, bands[page]))
            assert image.n_frames == 4
        assert np.array_equal(found.label("labelled", key), cut_at(key, values))


def test_tiles_of_annotations_are_drawn_once_and_cut(tree, run, shards, tmp_path):
    pytest.importorskip("pycocotools")
    tree.image("images/a.png", (100, 70))
    outlines = [[5.0, 5.0, 60.0, 8.0, 40.0, 60.0], [50.0, 30.0, 95.0, 30.0, 95.0, 65.0, 50.0, 65.0]]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 70}],
        "categories": [{"id": 4, "name": "box"}, {"id": 9, "name": "disc"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": category, "segmentation": [outline], "iscrowd": 0}
            for n, (category, outline) in enumerate(zip((4, 9), outlines, strict=True))
        ],
    }
    file = tree.text("a.json", json.dumps(content))
    for name, options in (("whole", ()), ("tiles", ("--tile", 32))):
        code, error = run("coco", file, tmp_path / name, "--images", tree.root / "images", *options)
        assert code == 0, error
    whole = shards(tmp_path / "whole").label("labelled", "a")
    assert len(np.unique(whole)) == 3
    found = shards(tmp_path / "tiles")
    assert len(found.keys("labelled")) == 3 * 4
    assert all(np.array_equal(found.label("labelled", key), cut_at(key, whole)) for key in found.keys("labelled"))


def test_a_jpeg_in_a_tiff_has_jpeg_tiles_and_an_orientation_stays(tree, run, shards, tmp_path):
    tiff(tree.root / "a.tif", noise(64, 64).transpose(2, 0, 1), compress="jpeg", photometric="ycbcr")
    exif = Image.Exif()
    exif[0x0112] = 6
    tree.save("b.jpg", Image.fromarray(noise(64, 64)), exif=exif)
    assert run("folder", tree.root, tmp_path / "out", "--tile", 32)[0] == 0
    samples = shards(tmp_path / "out").streams["unlabelled"]
    assert len(samples) == 8
    assert all(set(sample) == {"jpg"} for sample in samples.values())
    orientations = {key: Image.open(io.BytesIO(s["jpg"])).getexif().get(0x0112) for key, s in samples.items()}
    assert {value for key, value in orientations.items() if key.startswith("b")} == {6}
    assert {value for key, value in orientations.items() if key.startswith("a")} == {None}


@pytest.mark.parametrize("kind", ["16 bits", "colours", "white is zero", "palette"])
def test_label_maps_are_read_as_they_are_whole(tree, run, tmp_path, kind):
    """In parts, or whole where GDAL's numbers are others than Pillow's."""
    values = noise(40, 50, high=3)[..., 0]
    path = tree.root / "label.tif"
    rule = LabelRule(3)
    if kind == "16 bits":
        tiff(path, np.where(values == 0, 300, values)[None].astype(np.uint16))
        rule = LabelRule(3, {300: 0, 1: 1, 2: 2})
    elif kind == "colours":
        tiff(path, np.stack([values * 10, values, 0 * values]))
        rule = LabelRule(3, None, {(10 * v, v, 0): v for v in range(3)})
    elif kind == "white is zero":
        tiff(path, 255 - values[None], photometric="miniswhite")
    else:
        image = Image.fromarray(values).convert("P")
        image.putdata(values.ravel().tolist())
        path.parent.mkdir(parents=True)
        image.save(path)
    png(tree.root / "image.png", noise(40, 50))
    whole = rule.read(path.read_bytes(), "label.tif")
    render = ReadTiles(ReadFiles(str(tree.root), (("", rule),), None))
    for item in Tiling(32).cut(FileItem("k", "image.png", "label.tif"), (40, 50)):
        with Image.open(io.BytesIO(render(item).label)) as label:
            assert np.array_equal(np.asarray(label), whole[item.window])


def test_a_tile_of_a_tiff_that_no_memory_would_hold(tree, run, tmp_path):
    side = 100_000  # 30 GB of RGB
    tree.root.mkdir()
    path = tree.root / "huge.tif"
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "sparse_ok": True, "bigtiff": "yes"}
    shape = {"height": side, "width": side, "dtype": "uint8", "nodata": 0}
    pixels, values = noise(64, 64), np.ones((64, 64), np.uint8)
    window = rasterio.windows.Window(90_000, 80_000, 64, 64)
    with warnings.catch_warnings(action="ignore"):
        with rasterio.open(path, "w", driver="GTiff", count=3, **shape, **layout) as file:
            file.write(pixels.transpose(2, 0, 1), window=window)
        with rasterio.open(tree.root / "label.tif", "w", driver="GTiff", count=1, **shape, **layout) as file:
            file.write(values, 1, window=window)
    render = ReadTiles(ReadFiles(str(tree.root), (("", LabelRule(2)),), None))
    file = FileItem("k", "huge.tif", "label.tif")
    found = render(TileItem(file, 80_000, 90_000, 64, 64, is_last=False))
    assert found.key == "k_y080000_x090000"
    assert np.array_equal(decode_image(found.image, "x").permute(1, 2, 0).numpy(), pixels)
    with pytest.raises(LeftOut, match="k_y000000_x000000: no pixel has data"):
        render(TileItem(file, 0, 0, 64, 64, is_last=True))


def test_held_out_tiles_are_of_other_images(tree, names, run, shards, tmp_path):
    for number in range(8):
        png(tree.root / "images" / f"{number}.png", noise(40, 70, number))
        png(tree.root / "labels" / f"{number}.png", np.full((40, 70), number % 3, np.uint8))
    arguments = ("folder", tree.root, tmp_path / "out", "--classes", names, "--tile", 32, "--dev", 2, "--val", 0.25)
    assert run(*arguments)[0] == 0
    found = shards(tmp_path / "out")
    images = {stream: {key.split("_")[0] for key in found.keys(stream)} for stream in found.streams}
    assert {stream: len(keys) for stream, keys in images.items()} == {"labelled": 4, "dev": 2, "val": 2}
    assert len(set.union(*images.values())) == 8
    assert all(len(found.keys(stream)) == 6 * len(images[stream]) for stream in images)
    # Tiles of an image follow each other, row by row.
    order = list(found.streams["labelled"])
    assert order == [
        key for image in dict.fromkeys(k.split("_")[0] for k in order) for key in sorted(order) if key.startswith(image)
    ]


def test_empty_tiles_are_left_out_and_counted(tree, names, run, shards, tmp_path):
    pixels = noise(96, 96)
    pixels[:32] = 0
    tiff(tree.root / "images" / "a.tif", pixels.transpose(2, 0, 1), nodata=0)
    alpha = np.full((64, 64, 1), 255, np.uint8)
    alpha[32:] = 0
    png(tree.root / "images" / "b.png", np.concatenate([noise(64, 64, 1), alpha], axis=2))
    values = np.ones((96, 96), np.uint8)
    values[64:, :64] = 255
    png(tree.root / "labels" / "a.png", values)
    code, said = run("folder", tree.root, tmp_path / "out", "--classes", names, "--tile", 32)
    assert code == 0
    found = shards(tmp_path / "out")
    assert found.keys("labelled") == {f"a_y{y:06d}_x{x:06d}" for y, x in ((32, 0), (32, 32), (32, 64), (64, 64))}
    assert found.keys("unlabelled") == {"b_y000000_x000000", "b_y000000_x000032"}
    assert f"5 tiles left out that have no data: {tmp_path / 'out' / 'skipped.jsonl'}" in said
    assert "2 tiles left out that have nothing but ignored pixels:" in said
    assert "bad samples" not in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {"shard", "item", "reason", "message"} == set(lines[0])
    assert {line["message"] for line in lines if line["reason"] == "all_ignored"} == {
        f"a_y000064_x{x:06d}: all pixels of its label map are ignored" for x in (0, 32)
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--overlap", 4), "--overlap 4: only tiles overlap; give --tile PX too, or leave it out"),
        (("--tile", 32, "--overlap", 32), "--overlap 32: it must be at least 0 and less than --tile 32"),
        (("--tile", 32, "--max-side", 64), "--tile 32 with --max-side 64: an image is cut or shrunk; leave one of"),
        (("--tile", 8), "--tile 8: it must be 16 to 10000 px"),
        (("--tile", 20000), "--tile 20000: it must be 16 to 10000 px"),
    ],
)
def test_options_that_do_not_fit_together(tree, run, tmp_path, options, said):
    tree.image("a.jpg")
    code, error = run("folder", tree.root, tmp_path / "out", *options)
    assert code == 2
    assert said in error
    assert not (tmp_path / "out").exists()


def test_binary_masks_that_pillow_would_not_read_whole(tree, run, shards, tmp_path, monkeypatch):
    """Its limit is 179 million pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    mask = np.where(noise(64, 64, 1)[..., 0] > 100, 255, 0).astype(np.uint8)
    tiff(tree.root / "images" / "a.tif", noise(64, 64).transpose(2, 0, 1))
    tiff(tree.root / "masks" / "a.tif", mask[None])
    names = tree.text("two.txt", "ground", "object")
    options = ("--classes", names, "--tile", 32, "--label-suffix", ".tif")
    code, said = run("folder", tree.root, tmp_path / "out", *options)
    assert code == 0
    assert "written as 0 = ground, 255 = object" in said
    found = shards(tmp_path / "out")
    for key in found.keys("labelled"):
        assert np.array_equal(found.label("labelled", key), cut_at(key, mask == 255))
    assert found.index.streams["labelled"].class_pixels == (int((mask == 0).sum()), int((mask == 255).sum()), 0)


def test_parts_of_tiles_are_put_together(tree, run, contents, tmp_path):
    for number in range(4):
        pixels = noise(70, 100, number)
        pixels[:32, :32] = 0
        tiff(tree.root / f"{number}.tif", pixels.transpose(2, 0, 1), nodata=0)
    arguments = ("--tile", 32, "--samples-per-shard", 5)
    assert run("folder", tree.root, tmp_path / "whole", *arguments)[0] == 0
    parts = [tmp_path / f"part-{number}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        assert run("folder", tree.root, part, *arguments, "--part", f"{number}/2")[0] == 0
    merge_shards(parts, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert (tmp_path / "merged" / "skipped.jsonl").read_bytes().count(b"no_data") == 4


def test_other_tiles_need_another_folder(tree, run, tmp_path):
    tree.image("a.png", (40, 40))
    assert run("folder", tree.root, tmp_path / "out", "--tile", 32)[0] == 0
    for options in (("--tile", 16), ()):
        code, error = run("folder", tree.root, tmp_path / "out", *options)
        assert code == 2
        assert re.search(r"written with (tile=32|overlap=0), but", error)


@pytest.mark.parametrize("kind", ["tif", "png"])
def test_what_is_wrong_is_said_of_the_file_and_its_pixels(tree, names, run, tmp_path, kind):
    pixels, values = noise(70, 100), np.zeros((70, 100), np.uint8)
    values[50, 90] = 7
    if kind == "tif":
        tiff(tree.root / "images" / "a.tif", pixels.transpose(2, 0, 1))
        tiff(tree.root / "labels" / "a.tif", values[None])
        tiff(tree.root / "labels" / "b.tif", values[None, :60])
    else:
        png(tree.root / "images" / "a.png", pixels)
        png(tree.root / "labels" / "a.png", values)
        png(tree.root / "labels" / "b.png", values[:60])
    arguments = ["folder", tree.root, tmp_path / "out", "--classes", names, "--tile", 32, "--label-suffix", f".{kind}"]
    code, error = run(*arguments)
    assert code == 2
    assert f"labels/a.{kind}: value 7 at x=90, y=50 is no class" in error
    (tree.root / "images" / f"a.{kind}").rename(tree.root / "images" / f"b.{kind}")
    arguments[2] = tmp_path / "other"
    code, error = run(*arguments)
    assert code == 2
    assert f"labels/b.{kind}: 100 × 60 px, but its image images/b.{kind} has 100 × 70" in error


def test_damaged_images_are_bad_samples(tree, run, shards, tmp_path):
    """Each tile of a damaged image is one; an image whose header cannot be read is one."""
    path = tiff(tree.root / "a.tif", noise(64, 64).transpose(2, 0, 1))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    tree.bytes("b.jpg", b"\xff\xd8\xffno image")
    tree.image("c.png", (40, 20))
    code, error = run("folder", tree.root, tmp_path / "out", "--tile", 32)
    assert code == 2
    assert re.search(r"a\.tif: not a readable TIFF|b\.jpg: ", error)
    code, error = run("folder", tree.root, tmp_path / "out", "--tile", 32, "--skip-bad")
    assert code == 0
    assert shards(tmp_path / "out").keys("unlabelled") >= {"c_y000000_x000000", "c_y000000_x000008"}
    assert "bad samples left out" in error


def test_a_damaged_image_is_tried_once(tree):
    tree.bytes("a.png", b"\x89PNG\r\n\x1a\nno image")
    render = ReadTiles(ReadFiles(str(tree.root), (), None))
    file = FileItem("a", "a.png", None)
    for left in (0, 32):
        with pytest.raises(BadSample, match=r"a\.png: not a readable image"):
            render(TileItem(file, 0, left, 32, 32, is_last=False))
    tree.image("a.png", (64, 32))
    with pytest.raises(BadSample):  # it is not opened again for the last one
        render(TileItem(file, 0, 32, 32, 32, is_last=True))
    assert render(TileItem(file, 0, 0, 32, 32, is_last=True)).key == "a_y000000_x000000"


def test_a_key_that_a_tile_has_is_refused(tree, run, tmp_path):
    tree.image("a.png", (40, 20))
    tree.image("a_y000000_x000008.png")
    code, error = run("folder", tree.root, tmp_path / "out", "--tile", 32)
    assert code == 2
    assert "a.png: a tile of it has the key 'a_y000000_x000008', as another image; rename one" in error


def test_without_tiles_nothing_is_said_of_them(tree, run, shards, tmp_path):
    tree.image("a.png", (40, 20))
    assert run("folder", tree.root, tmp_path / "out")[0] == 0
    assert not {"tile", "overlap", "rasterio"} & shards(tmp_path / "out").index.settings.keys()


def test_the_same_bytes_after_a_kill_and_with_several_processes(tree, names, run, contents, tmp_path):
    for number in range(6):
        if number % 2:
            png(tree.root / "images" / f"{number}.png", noise(70, 70, number))
        else:
            tiff(tree.root / "images" / f"{number}.tif", noise(70, 70, number).transpose(2, 0, 1))
        values = noise(70, 70, 10 + number, high=3)[..., 0]
        values[:, :40] = 255
        png(tree.root / "labels" / f"{number}.png", values)
    arguments = ["folder", tree.root, "OUT", "--classes", names, "--tile", 32, "--samples-per-shard", 6]

    def to(folder, *options):
        return [folder if word == "OUT" else word for word in arguments] + list(options)

    assert run(*to(tmp_path / "whole"))[0] == 0
    order = [json.loads(line)["message"][0] for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()]
    late = tree.root / "labels" / f"{order[-1]}.png"  # the writer waits for the last image's label map
    data = late.read_bytes()
    late.unlink()
    os.mkfifo(late)
    broken = tmp_path / "broken"
    command = [sys.executable, "-m", "maskmatch_scale", "shards", "write", *map(str, to(broken, "--workers", "1"))]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(broken.glob("labelled-*.tar"))) < 3:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "index.json").exists()
    late.unlink()
    late.write_bytes(data)
    done = {path.name: path.stat().st_mtime_ns for path in broken.glob("labelled-*.tar")}
    assert done
    assert run(*to(broken), workers=2)[0] == 0
    assert contents(broken) == contents(tmp_path / "whole")
    assert all((broken / name).stat().st_mtime_ns == time_ns for name, time_ns in done.items())
