"""The contact sheet: what is on it, and that bad samples do not keep it from being made."""

import json

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.tools.overlay import overlaid, percent
from maskmatch_scale.data.tools.sheet import fitting, load_font
from maskmatch_scale.data.tools.show import _drawn, contact_sheet
from tests.data.bad_shards import bad_shards, encode, sample, tar_bytes

from .test_verify import write_folder


def pixels(path):
    return np.array(Image.open(path).convert("RGB"))


def test_the_same_seed_makes_the_same_sheet(shapes, tmp_path):
    first = contact_sheet(shapes, tmp_path / "new" / "a.png", count=3).read_bytes()
    assert contact_sheet(shapes, tmp_path / "b.png", count=3).read_bytes() == first
    assert contact_sheet(shapes, tmp_path / "c.png", count=3, seed=1).read_bytes() != first


def test_one_stream_or_all(shapes, tmp_path):
    every = pixels(contact_sheet(shapes, tmp_path / "a.png", count=2))
    one = pixels(contact_sheet(shapes, tmp_path / "b.png", count=2, stream="unlabelled"))
    assert len(one) < len(every) / 3
    with pytest.raises(DataError, match="'nonsense' is not in the index"):
        contact_sheet(shapes, tmp_path / "c.png", stream="nonsense")
    with pytest.raises(DataError, match="not a shard folder, but images; write one"):
        contact_sheet(tmp_path, tmp_path / "c.png")


def test_colours_are_those_of_the_index_and_ignored_pixels_are_striped(shapes):
    index = ShardIndex.load(shapes)
    label = np.repeat(np.array([0, 1, 2, 255], np.uint8), 100).reshape(1, 400).repeat(400, 0)
    over = np.array(overlaid(np.full((400, 400, 3), 100, np.uint8), label, index.palette, index.ignore_index, 400))
    for value, colour in enumerate(index.palette):
        assert np.abs(over[200, 50 + 100 * value] - (0.75 * np.array(colour) + 25)).max() <= 1
    striped = {tuple(pixel) for pixel in over[:, 310:390].reshape(-1, 3).tolist()}
    assert striped == {(205, 205, 205), (120, 120, 120)}


@pytest.mark.parametrize("labelled", [True, False])
def test_bad_samples_have_cards_that_say_why(tmp_path, labelled):
    cases = [case for case in bad_shards().values() if case.labelled == labelled]
    shards = [(case.data, case.samples) for case in cases] + [(b"no tar", 3), (tar_bytes(sample("a")), 99)]
    root = write_folder(tmp_path / "x", {"s": (labelled, shards)})
    sheet = pixels(contact_sheet(root, tmp_path / "sheet.png", count=200))
    assert (sheet == (0xB3, 0x26, 0x1E)).all(-1).any()


def test_images_of_any_shape_and_names_in_any_script(tmp_path):
    shapes = [(1, 1), (1, 900), (900, 1), (3000, 20), (7, 5)]
    images = [encode(np.zeros((*size, 3), np.uint8), "PNG") for size in shapes]
    members = [(f"Ключ-{'ü' * 20}-{number}.jpg", image) for number, image in enumerate(images)]
    root = write_folder(tmp_path / "x", {"s": (False, [(tar_bytes(members), len(members))])})
    assert contact_sheet(root, tmp_path / "sheet.png").is_file()
    index = json.loads((root / "index.json").read_text())
    names = [f"a class of a long name {n}" for n in range(150)]
    names[0] = "a line\nand another"
    index |= {"classes": names, "palette": [[1, 2, 3]] * 150, "source": "a line\nand another"}
    index["streams"]["t\nu"] = {"labelled": True, "shards": []}
    (root / "index.json").write_text(json.dumps(index))
    assert contact_sheet(root, tmp_path / "sheet.png").is_file()


def test_samples_are_drawn_without_repeats():
    assert _drawn(5, 9, 0, "s") == [0, 1, 2, 3, 4]
    drawn = _drawn(10**9, 24, 0, "s")
    assert len(set(drawn)) == 24
    assert drawn == sorted(drawn) != _drawn(10**9, 24, 0, "t")


def test_long_names_lose_their_middle():
    font = load_font(14)
    short = fitting("a" * 5000 + "\n" + "b" * 5000, font, 120)
    assert font.getlength(short) <= 120
    assert short[0] == "a"
    assert short[-1] == "b"
    assert [percent(share) for share in (0, 1e-5, 0.0123, 0.5)] == ["not shown", "< 0.1%", "1.2%", "50%"]


def test_a_stream_that_is_not_there_is_named_with_its_option(shapes, maskmatch):
    code, _, err = maskmatch("shards", "show", shapes, "--stream", "labeled")
    assert code == 2
    assert f"--stream labeled: no such stream in {shapes}, which has labelled, unlabelled" in err
