"""What a new user mistypes: each line names the option or file, and what would work."""

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.sources.splits import Pair, hold_out

PAIRS = [Pair(f"{number}.jpg", f"{number}.png") for number in range(8)]


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        ("8", "--val 8: there are 8 labelled samples, and some must be left to learn from; the most is --val 7"),
        ("200", "the most is --val 7"),
        ("0.05", r"--val 0\.05: less than one of 8 labelled samples; give a count: --val 1"),
        ("20%", r"a share below 1 \(0\.1\), which is --val 0\.2 here"),
        ("1.0", "--val 1.0: it must be a count"),
        ("-1", "--val -1: it must be a count"),
        ("many", "--val many: it must be a count"),
    ],
)
def test_amounts_that_cannot_be_held_out(amount, said):
    with pytest.raises(DataError, match=said):
        hold_out(PAIRS, amount, 0, "--val")


@pytest.mark.parametrize(("amount", "count"), [("7", 7), ("0.2", 2), ("1", 1), ("0", 0)])
def test_what_the_messages_offer_is_taken(amount, count):
    rest, held = hold_out(PAIRS, amount, 0, "--val")
    assert (len(rest), len(held)) == (8 - count, count)


def test_nothing_to_hold_out_from():
    with pytest.raises(DataError, match=r"no sample has a label map, .* Or leave --val out"):
        hold_out([], "2", 0, "--val")
    assert hold_out([], "0", 0, "--val") == ([], [])


@pytest.fixture
def photos(tree):
    for number in range(4):
        tree.image(f"images/{number}.jpg")
        tree.label(f"masks/{number}.png", number % 2)
    tree.text("names.txt", "ground", "crack")
    tree.text("twice.txt", "ground", "crack", "ground")
    tree.text("empty.txt")
    return tree.root


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "folder {root} {out} --classes {root}/names.txt --images rgb",
            "--images rgb: no such folder in {root}, which",
        ),
        ("folder {root} {out} --classes {root}/names.txt --labels gt", "which has images, masks"),
        ("folder {root} {out} --classes {root}/names.txt --val test", "--val test: no folder {root}/images/test, and"),
        (
            "folder {root} {out} --classes {root}/names.txt --val 3 --dev 1",
            "--dev 1: there is one labelled sample, which is needed to learn from; leave --dev",
        ),
        ("folder {root} {out} --classes {root}/twice.txt", "the class 'ground' is in it twice"),
        ("folder {root} {out} --classes {root}/empty.txt", "0 classes in it; 1 to 254 are needed"),
        ("folder {root} {out}", "label maps need names: --classes FILE"),
        (
            "folder {root}/images/0.jpg {out}",
            "{root}/images/0.jpg: a file, not a folder; name the folder of the images",
        ),
        ("folder {root}/nowhere/deep {out}", "{root}/nowhere: no such folder; name the folder of the images"),
        ("voc {root}/nowhere {out}", "{root}/nowhere: no such folder; it is part of VOC2012"),
        ("voc {root} {out}", "{root}/JPEGImages: no such folder; it is part of VOC2012, which SOURCE must name; other"),
        ("cityscapes {root} {out}", "{root}/leftImg8bit: no such folder; it comes with"),
        ("ade20k {root} {out}", "{root}/annotations: no such folder; it is part of ADEChallengeData2016, which SOURCE"),
        ("coco-stuff {root}/nowhere {out}", "{root}/nowhere: no such folder; name the folder of images"),
        ("list {root} {out}", "{root}: a folder; for one, use `maskmatch shards write folder`"),
        (
            "folder {root} {out} --split-val {root}/no.txt",
            "{root}/no.txt: this list of samples cannot be read (No such",
        ),
    ],
)
def test_one_line(run, photos, tmp_path, words, said):
    places = {"root": photos, "out": tmp_path / "out"}
    code, err = run(*(word.format(**places) for word in words.split()))
    assert (code, err.count("\n")) == (2, 1)
    assert said.format(**places) in err
    assert not (tmp_path / "out").exists()


def test_another_layout_is_named(run, tree, tmp_path):
    tree.image("JPEGImages/a.jpg")
    tree.label("SegmentationClass/a.png", 1)
    code, err = run("folder", tree.root, tmp_path / "out")
    assert code == 0
    assert f"note: {tree.root} has the layout of source voc; source folder finds no label map in it without" in err
