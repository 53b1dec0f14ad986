"""Label maps of 0 and 255: a class of binary masks, ignored pixels, or a question to the user."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.label import decode_raw_values
from maskmatch_scale.data.writing.sources import label_values
from maskmatch_scale.data.writing.sources.label_values import binary_values

SAID = "note: label maps hold 0 and 255: written as 0 = ground, 255 = object; --id-map says otherwise"


@pytest.fixture
def masks(tree):
    """Writes an image and a label map for each list of values, and says the arguments of the command."""

    def write(*maps, classes=("ground", "object")):
        for number, values in enumerate(maps):
            tree.image(f"images/{number}.jpg")
            if isinstance(values, bytes):
                tree.bytes(f"labels/{number}.png", values)
            else:
                tree.label(f"labels/{number}.png", np.resize(values, (8, 12)))
        return "folder", tree.root, tree.root / "out", "--classes", tree.text("names.txt", *classes)

    return write


def test_binary_masks_are_recognised(masks, tree, run, shards, contents, tmp_path):
    arguments = masks([0, 255], [0], [255], [255, 0, 0])
    code, err = run(*arguments)
    assert (code, err.splitlines()[0]) == (0, SAID)
    found = shards(tree.root / "out")
    assert found.label("labelled", "0").tolist() == [[0, 1] * 6] * 8
    assert (found.label("labelled", "1").max(), found.label("labelled", "2").min()) == (0, 1)
    assert found.index.streams["labelled"].class_pixels == (48 + 96 + 64, 48 + 96 + 32, 0)
    # The same as by an id map that says it, and the other way round by one that says that.
    folder, root, _, *classes = arguments
    for name, lines in (("same", ("0: ground", "255: object")), ("other", ("0: object", "255: ignore"))):
        id_map = tree.text(f"{name}.yaml", *lines)
        code, err = run(folder, root, tmp_path / name, *classes, "--id-map", id_map)
        assert (code, "hold 0 and 255" in err) == (0, False)
    assert contents(tmp_path / "same") == contents(tree.root / "out")
    assert shards(tmp_path / "other").label("labelled", "0").tolist() == [[1, 255] * 6] * 8


@pytest.mark.parametrize("one", [[0, 1], [0, 1, 255], [1]])
def test_255_is_ignored_where_a_label_map_has_the_other_class(masks, tree, run, shards, one):
    code, err = run(*masks([0, 255], [255], one, [0]))
    assert (code, "hold 0 and 255" in err) == (0, False)
    found = shards(tree.root / "out")
    *_, ignored = found.index.streams["labelled"].class_pixels
    assert f"note: stream 'labelled': {100 * ignored / (4 * 96):.2g}% of the pixels are ignored\n" in err
    assert found.label("labelled", "0").tolist() == [[0, 255] * 6] * 8
    assert (found.label("labelled", "2") == np.resize(one, (8, 12))).all()


@pytest.mark.parametrize(
    ("maps", "classes", "options", "said"),
    [
        ([[0, 255]], 3, (), "0.png: holds 0 and 255, and 3 classes are named.*`0: class0`, `255: class2`"),
        ([[0, 255]], 1, (), "0.png: holds 0 and 255, and one class is named.*`0: class0`, `255: ignore`"),
        ([[255]], 2, (), "0.png: holds nothing but 255, and 2 classes"),
        ([[0, 128, 255]], 2, (), "0.png: holds 0, 128 and 255, .*`0: class0`, `128: ignore`, `255: class1`"),
        ([[0, 128, 255]], 2, ("--unknown-as-ignore",), "`128: ignore`, `255: class1`"),
        ([[0, 255], [0, 1, 7, 255]], 2, ("--unknown-as-ignore",), "1.png: holds 0, 1, 7 and 255"),
        ([range(0, 256, 5)], 2, (), r"0.png: holds 0, 5, 10, 15, 20 … and 255, .*`5: ignore`"),
    ],
)
def test_what_cannot_be_known_is_asked(masks, tree, run, maps, classes, options, said):
    arguments = masks(*maps, classes=[f"class{number}" for number in range(classes)])
    code, err = run(*arguments, *options)
    assert (code, err.count("\n"), "--id-map FILE" in err) == (2, 1, True)
    assert re.search(said, err)
    assert not (tree.root / "out").exists()


def test_other_values_among_binary_masks(masks, tree, run, shards, tmp_path):
    arguments = masks([0, 255], [0, 255, 9])
    code, err = run(*arguments)
    assert (code, "is neither 0 nor 255, as in other label maps; --id-map" in err) == (2, True)
    folder, root, _, *classes = arguments
    code, err = run(folder, root, tmp_path / "skipped", *classes, "--skip-bad")
    assert (code, "1 bad samples" in err, shards(tmp_path / "skipped").keys("labelled")) == (0, True, {"0"})


def test_binary_masks_whose_other_values_are_ignored(masks, tree, run, shards):
    assert run(*masks([0, 255], [0, 255, 9]), "--unknown-as-ignore")[0] == 0
    assert shards(tree.root / "out").label("labelled", "1").tolist() == [[0, 1, 255] * 4] * 8


def test_unreadable_label_maps_are_left_to_the_writer(masks, tree, run, shards):
    arguments = masks(b"", b"no label map", [0, 255])
    code, err = run(*arguments)
    assert (code, "--skip-bad" in err) == (2, True)
    code, err = run(*arguments, "--skip-bad")
    assert (code, "2 bad samples" in err, shards(tree.root / "out").keys("labelled")) == (0, True, {"2"})


def test_a_folder_written_otherwise_is_not_gone_on_with(masks, tree, run):
    arguments = masks([0, 255], [0, 1])
    assert run(*arguments)[0] == 0
    tree.label("labels/1.png", np.resize([0, 255], (8, 12)))
    code, err = run(*arguments)
    assert (code, "255 is a class now and was ignored, or the reverse" in err) == (2, True)
    # An id map with the meaning of then goes on.
    id_map = tree.text("then.yaml", "0: ground", "255: object")
    tree.label("labels/1.png", np.resize([0, 255], (8, 12)))
    assert run(*arguments, "--overwrite")[0] == 0
    tree.image("images/2.jpg")
    tree.label("labels/2.png", np.resize([0, 1], (8, 12)))
    code, err = run(*arguments, "--append")
    assert (code, "then an --id-map with the meaning of then goes on" in err) == (2, True)
    code, err = run(*arguments, "--append", "--id-map", id_map)
    assert (code, "labels/2.png: value 1 at" in err) == (2, True)
    tree.label("labels/2.png", np.resize([0, 255], (8, 12)))
    assert run(*arguments, "--append", "--id-map", id_map)[0] == 0


def test_a_table_with_values_is_asked_nothing(masks, tree, run, shards):
    """Those of the package say what 255 means; `coco` has 81 classes."""
    folder, root, out, option, _ = masks([0, 255])
    code, err = run(folder, root, out, option, "coco")
    assert (code, "hold 0 and 255" in err) == (0, False)
    assert shards(out).label("labelled", "0").tolist() == [[0, 255] * 6] * 8


KINDS = [values for size in (1, 2, 3) for values in itertools.combinations((0, 1, 255), size)]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder with a label map of each kind under many names: `NUMBER/KIND.png`."""
    root = tmp_path_factory.mktemp("many")
    (root / "0").mkdir()
    for number, values in enumerate(KINDS):
        Image.fromarray(np.array([values], np.uint8)).save(root / "0" / f"{number}.png")
    for number in range(1, 100):
        (root / str(number)).symlink_to(root / "0")
    return root


@settings(deadline=None)
@given(kinds=st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=60), random=st.randoms())
def test_the_answer_is_that_of_all_label_maps_together(many, kinds, random):
    """It does not depend on the order of the list, nor on threads."""
    paths = [f"{number}/{kind}.png" for number, kind in enumerate(kinds)]
    random.shuffle(paths)
    every = set().union(*(KINDS[kind] for kind in kinds))

    def found():
        return binary_values(many, paths, ("a", "b"), unknown_as_ignore=False)

    if every == {0, 255}:
        assert found() == {0: 0, 255: 1}
    elif every == {255}:
        with pytest.raises(DataError, match="nothing but 255"):
            found()
    else:
        assert found() is None


def test_so_many_label_maps_are_looked_at_at_most(many, monkeypatch):
    looked = []

    def decoded(data, path):
        looked.append(path)
        return decode_raw_values(data, path)

    monkeypatch.setattr(label_values, "LOOKED_AT", 5)
    monkeypatch.setattr(label_values, "decode_raw_values", decoded)
    paths = [f"{number}/{KINDS.index((0, 255))}.png" for number in range(100)]
    assert binary_values(many, paths, ("a", "b"), unknown_as_ignore=False) == {0: 0, 255: 1}
    assert 5 <= len(looked) < 100
    assert looked[0] != paths[0]  # not the first ones, which may be of one kind
