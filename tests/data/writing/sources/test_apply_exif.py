"""Photos that are stored turned, with label maps that were drawn upright."""

import io
import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(tree):
    """Two photos, of which the first is stored turned; label maps are drawn upright. Their left third is class 1."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:, :5] = 200
    tree.save("images/0.jpg", Image.fromarray(np.rot90(upright).copy()), exif=exif, quality=95)
    tree.image("images/1.jpg", (16, 24))
    for number in range(2):
        tree.label(f"masks/{number}.png", (upright[:, :, 0] > 0).astype(np.uint8))
    tree.text("names.txt", "ground", "crack")
    return tree


def test_the_cause_is_named_and_the_option_helps(run, photos, shards, tmp_path):
    words = ["folder", photos.root, tmp_path / "out", "--classes", photos.root / "names.txt"]
    code, err = run(*words)
    assert (code, err.count("EXIF")) == (2, 1)
    assert "masks/0.png: 16 × 24 px, but its image images/0.jpg has 24 × 16: the photo is stored turned (EXIF " in err
    assert "orientation 6), and its label map was drawn upright; --apply-exif turns the photo's pixels" in err
    code, _ = run(*words[:2], tmp_path / "upright", *words[3:], "--apply-exif")
    assert code == 0
    found = shards(tmp_path / "upright")
    with Image.open(io.BytesIO(found.streams["labelled"]["0"]["jpg"])) as image:
        assert (image.size, dict(image.getexif())) == ((16, 24), {})
        bright = np.asarray(image.convert("L")) > 100
    assert (bright == (found.label("labelled", "0") == 1)).mean() > 0.95
    assert found.streams["labelled"]["1"]["jpg"] == (photos.root / "images/1.jpg").read_bytes()


def test_label_maps_of_the_stored_size(run, photos, tmp_path):
    photos.label("masks/0.png", np.zeros((16, 24), np.uint8))
    words = ["folder", photos.root, tmp_path / "out", "--classes", photos.root / "names.txt"]
    code, err = run(*words, "--apply-exif")
    assert code == 2
    assert "--apply-exif has turned the photo, and its label map fits it as it is stored; leave that option out" in err


def test_another_size_is_not_explained_by_exif(run, photos, tmp_path):
    photos.label("masks/1.png", np.zeros((16, 24), np.uint8))  # exchanged, but the photo is upright
    photos.label("masks/0.png", np.zeros((10, 10), np.uint8))  # turned, but neither size
    words = ["folder", photos.root, tmp_path / "out", "--classes", photos.root / "names.txt", "--skip-bad"]
    code, err = run(*words)
    assert code == 2
    lines = (tmp_path / "out" / ".written.jsonl").read_text() if code else err
    assert "EXIF" not in err + lines


def test_the_option_is_a_setting(run, photos, tmp_path):
    (photos.root / "images/0.jpg").unlink()
    (photos.root / "masks/0.png").unlink()
    words = ["folder", photos.root, tmp_path / "out", "--classes", photos.root / "names.txt"]
    assert run(*words)[0] == 0
    assert "apply_exif" not in json.loads((tmp_path / "out" / "index.json").read_text())["settings"]
    code, err = run(*words, "--apply-exif")
    assert code == 2
    assert "apply_exif" in err
