"""`maskmatch predict` from its words to the files, and what becomes of mistakes and broken images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskmatch_scale.errors import UserError
from maskmatch_scale.export import load_export
from maskmatch_scale.predict.inputs import ImageFile
from maskmatch_scale.predict.label_maps import refuse_label_maps
from maskmatch_scale.runs.evaluate import inference_of
from maskmatch_scale.runs.model import open_run
from tests.data.faulty_server import Fault, FaultyServer
from tests.predict.environment import without_ranks

NAMES = ("a", "b", "sub/a", "sub/c")


def ids_of(out: Path, name: str) -> np.ndarray:
    with Image.open(out / "ids" / f"{name}.png") as image:
        return np.array(image)


def expected(run: Path, path: Path, weights: str = "ema") -> np.ndarray:
    """What `Inference` gives for a file, read by Pillow."""
    recipe, segmenter, _ = open_run(run, weights)
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return inference_of(recipe, segmenter, torch.device("cpu")).predict(segmenter, pixels).numpy()


def written(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("weights", ["ema", "student"])
def test_ids_are_the_classes_that_evaluation_predicts(run, photos, tmp_path, maskmatch, weights):
    code, _, err = maskmatch("predict", run, photos, "--out", tmp_path / "out", "--weights", weights)
    assert code == 0, err
    for name in NAMES:
        (path,) = photos.glob(f"{name}.*")
        found = ids_of(tmp_path / "out", name)
        assert np.array_equal(found, expected(run, path, weights))
        assert found.shape == np.array(Image.open(path)).shape[:2]
    assert len(np.unique(ids_of(tmp_path / "out", "a"))) == 3
    assert "4/4 images" in err


def test_an_export_predicts_what_its_run_predicts_and_goes_on_in_its_folder(run, export, photos, tmp_path, maskmatch):
    settings = ("evaluation.window_px=96", "evaluation.flip=true")
    assert maskmatch("predict", run, photos, "--out", tmp_path / "run", *settings)[0] == 0
    assert maskmatch("predict", export, photos, "--out", tmp_path / "export", *settings)[0] == 0
    assert written(tmp_path / "run") == written(tmp_path / "export")
    maps = sorted((tmp_path / "run").glob("ids/**/*.png"))
    before = [path.stat().st_mtime_ns for path in maps]
    assert maskmatch("predict", export, photos, "--out", tmp_path / "run", *settings)[0] == 0
    assert [path.stat().st_mtime_ns for path in maps] == before


def test_a_run_that_evaluates_in_another_way_has_an_export_that_does(run, export):
    described = json.loads((export / "segmenter.json").read_text())
    assert described["evaluation"]["mode"] == "sliding"
    assert "pictures" not in described["evaluation"]
    loaded = load_export(export)
    assert loaded.description.evaluation.overlap == 0.25


def test_broken_files_are_said_and_listed_and_the_others_predicted(export, photos, tmp_path, maskmatch):
    (photos / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes()[:900])
    (photos / "list.txt").write_text("a.png\ncut.jpg\ngone.png\nsub/c.webp\n")
    code, _, err = maskmatch("predict", export, photos / "list.txt", "--out", tmp_path / "out")
    assert code == 1
    assert "2 of 4 images could not be predicted" in err
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert [Path(line["image"]).name for line in failed] == ["cut.jpg", "gone.png"]
    assert all(line["reason"] in err for line in failed)
    assert "Traceback" not in err
    assert sorted(path.name for path in (tmp_path / "out").glob("ids/**/*.png")) == ["a.png", "c.png"]
    assert not list((tmp_path / "out").rglob(".*"))
    # Mended, they are predicted by the next start, and are no longer listed.
    (photos / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes())
    (photos / "gone.png").write_bytes((photos / "a.png").read_bytes())
    assert maskmatch("predict", export, photos / "list.txt", "--out", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "failed.jsonl").exists()


def test_odd_names_are_failures_or_predicted_and_end_nothing(export, photos, tmp_path, maskmatch):
    not_utf8 = os.fsdecode(b"\xff")
    (photos / f"{not_utf8}bad.png").write_bytes(b"no png")
    shutil.copy(photos / "a.png", photos / f"{not_utf8}good.png")
    (photos / "list.txt").write_text(f"{'x' * 300}.jpg\nhttps://[x/a.jpg\na.png/b.jpg\nsub\n")
    code, _, err = maskmatch("predict", export, photos / "list.txt", photos, "--out", tmp_path / "out")
    assert (code, "Traceback" in err) == (1, False), err
    failed = [json.loads(line)["image"] for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    ends = [f"{'x' * 300}.jpg", "https://[x/a.jpg", "a.png/b.jpg", "sub", f"{not_utf8}bad.png"]
    assert len(failed) == 5
    assert all(name.endswith(end) for name, end in zip(failed, ends, strict=True)), failed
    assert len(list((tmp_path / "out" / "ids").rglob("*.png"))) == 5


def test_finished_images_are_skipped_and_unfinished_ones_are_not(export, photos, tmp_path, maskmatch):
    out = tmp_path / "out"
    assert maskmatch("predict", export, photos, "--out", out)[0] == 0
    first = written(out)
    (out / "overlay" / "b.jpg").unlink()
    kept = out / "ids" / "a.png"
    kept.write_bytes(b"kept")
    assert maskmatch("predict", export, photos, "--out", out)[0] == 0
    assert kept.read_bytes() == b"kept"
    assert written(out) == first | {"ids/a.png": b"kept"}
    assert maskmatch("predict", export, photos, "--out", out, "--overwrite")[0] == 0
    assert written(out) == first


def test_other_settings_in_one_folder_are_refused_unless_all_is_made_again(export, photos, tmp_path, maskmatch):
    out = tmp_path / "out"
    assert maskmatch("predict", export, photos, "--out", out)[0] == 0
    before = written(out)
    code, _, err = maskmatch("predict", export, photos, "--out", out, "evaluation.flip=true")
    assert code == 2
    assert "predict.json: made with flip = false, and now it is true" in err
    assert len(err.splitlines()) == 1
    assert written(out) == before
    # Interrupted after its first image, --overwrite leaves old predictions, which do not count as finished.
    one = photos / "a.png"
    (photos / "list.txt").write_text("sub/a.png\na.png\n")
    assert maskmatch("predict", export, one, "--out", out, "evaluation.flip=true", "--overwrite")[0] == 0
    assert maskmatch("predict", export, photos / "list.txt", "--out", out, "evaluation.flip=true")[0] == 0
    assert ids_of(out, "sub/a").shape == (40, 50)
    fresh = tmp_path / "fresh"
    assert maskmatch("predict", export, photos / "list.txt", "--out", fresh, "evaluation.flip=true")[0] == 0
    for name in ("a", "sub/a"):
        assert np.array_equal(ids_of(out, name), ids_of(fresh, name))


def test_overwriting_leaves_nothing_of_another_model_for_an_image(export, photos, tmp_path, maskmatch):
    out = tmp_path / "out"
    for folder, name in (("geojson", "a.geojson"), ("ids", "a.tif"), ("ids/sub", ".a.png.0a1b2c3d.new")):
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / name).touch()
    (out / "ids" / "other.png").touch()
    (photos / "b.jpg").write_bytes(b"no jpeg")
    (out / "ids" / "b.png").touch()
    assert maskmatch("predict", export, photos, "--out", out, "--overwrite", "--no-overlay", "--no-confidence")[0] == 1
    assert sorted(map(str, (path.relative_to(out) for path in out.rglob("*") if path.is_file()))) == [
        "failed.jsonl",
        "ids/a.png",
        "ids/other.png",
        "ids/sub/a.png",
        "ids/sub/c.png",
        "predict.json",
    ]


def shard_of(photos: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(photos / "a.png", "first.png")
        tar.add(photos / "b.jpg", "deep/second.jpg")
        (photos / "broken.jpg").write_bytes(b"no jpeg")
        tar.add(photos / "broken.jpg", "third.jpg")
        (photos / "broken.jpg").unlink()
    return path


def test_samples_of_shards_are_predicted(run, photos, tmp_path, maskmatch):
    shard = shard_of(photos, tmp_path / "some.tar")
    code, _, err = maskmatch("predict", run, shard, "--out", tmp_path / "out")
    assert code == 1
    assert "some.tar: third" in err
    assert np.array_equal(ids_of(tmp_path / "out", "some/first"), expected(run, photos / "a.png"))
    assert ids_of(tmp_path / "out", "some/deep/second").shape == (70, 150)


def test_what_is_lost_of_a_shard_is_said(export, photos, tmp_path, maskmatch):
    shard = shard_of(photos, tmp_path / "some.tar")
    content = shard.read_bytes()
    second = content.index(b"deep/second.jpg")
    shard.write_bytes(content[:second] + b"\xff" * 512 + content[second + 512 :])
    code = maskmatch("predict", export, shard, "--out", tmp_path / "out")[0]
    assert code == 1
    (failed,) = (tmp_path / "out" / "failed.jsonl").read_text().splitlines()
    assert f"some.tar: the header at byte {second} is damaged, and what follows is lost" in failed
    assert (tmp_path / "out" / "ids" / "some" / "first.png").is_file()


def test_a_second_sample_of_a_key_is_a_failure(export, photos, tmp_path, maskmatch):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name in ("a", "b", "a"):
            tar.add(photos / "a.png", f"{name}.png")
    for options in ((), (), ("--overwrite",)):
        code = maskmatch("predict", export, tmp_path / "twice.tar", "--out", tmp_path / "out", *options)[0]
        assert code == 1
        assert "an earlier sample of this key has 'png' too" in (tmp_path / "out" / "failed.jsonl").read_text()
        assert {path.name for path in (tmp_path / "out" / "ids" / "twice").iterdir()} == {"a.png", "b.png"}


def test_a_shard_with_fewer_samples_than_its_index_says_is_a_failure(export, shapes, tmp_path, maskmatch):
    folder = Path(shutil.copytree(shapes, tmp_path / "data"))
    index = json.loads((folder / "index.json").read_text())
    entry = index["streams"]["dev"]["shards"][0]
    with tarfile.open(folder / entry["file"], "w") as tar:
        tar.add(folder / "index.json", "notes")  # a member of no sample
    code, _, err = maskmatch("predict", export, folder, "--out", tmp_path / "out", "--no-overlay", "--no-confidence")
    assert code == 1
    assert f"samples where the index says {entry['samples']}" in err


def test_a_checkpoint_is_named_from_its_own_folder(run, photos, tmp_path, maskmatch, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    (name,) = Path().glob("step-*")
    code, _, err = maskmatch("predict", name, photos / "a.png", "--out", tmp_path / "out")
    assert code == 0, err
    assert np.array_equal(ids_of(tmp_path / "out", "a"), expected(run, photos / "a.png"))


def test_a_rank_beside_the_first_of_its_machine_says_why_it_fails(export, photos, small_disk, maskmatch, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = maskmatch("predict", export, photos, "--out", small_disk(kib=24).path / "out")
    assert code == 2
    assert "maskmatch: error: rank 1: " in err
    assert "no room is left on this disk" in err


def test_a_shard_folder_is_predicted_whole(export, shapes, tmp_path, maskmatch):
    code, _, err = maskmatch("predict", export, shapes, "--out", tmp_path / "out", "--no-overlay", "--no-confidence")
    assert code == 0
    assert "42/42 images" in err
    assert len(list((tmp_path / "out").rglob("*.png"))) == 42
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ids", "predict.json"}


def test_images_and_shards_are_fetched_from_a_server(run, photos, tmp_path, maskmatch, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard_of(photos, photos / "some.tar")
    faults = {"a.png": [Fault(times=1, status=500)], "gone.png": [Fault(status=404)]}
    with FaultyServer(photos, faults) as server:
        words = [f"{server.url}/{name}" for name in ("a.png", "sub/c.webp", "gone.png?sig=secret", "some.tar")]
        code, _, err = maskmatch("predict", run, *words, "--out", tmp_path / "out")
    assert code == 1
    assert "404" in err
    assert "secret" not in err + (tmp_path / "out" / "failed.jsonl").read_text()
    assert np.array_equal(ids_of(tmp_path / "out", "a"), expected(run, photos / "a.png"))
    assert np.array_equal(ids_of(tmp_path / "out", "sub/c"), expected(run, photos / "sub" / "c.webp"))
    assert np.array_equal(ids_of(tmp_path / "out", "some/first"), expected(run, photos / "a.png"))
    assert len((tmp_path / "out" / "failed.jsonl").read_text().splitlines()) == 2


WITHOUT = "import sys; sys.modules |= {'deepspeed': None, 'accelerate': None}; "
MAIN = "from maskmatch_scale.cli.main import main; sys.argv[0] = 'maskmatch'; main()"


def test_help_has_an_example_and_imports_no_large_library():
    check = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + check + MAIN, "predict", "--help"],
        env=without_ranks() | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Example: maskmatch predict runs/mine photos" in done.stdout
    assert done.stderr == "False\n"


def test_an_export_needs_neither_deepspeed_nor_accelerate_and_ranks_share_a_folder(export, photos, tmp_path):
    """Two processes as a launcher starts them, in an environment where the two libraries cannot be imported."""
    out = tmp_path / "out"
    for number in range(5):
        os.link(photos / "a.png", photos / f"n{number}.png")
    (photos / "broken.jpg").write_bytes(b"no jpeg")
    arguments = ["predict", str(export), str(photos), "--out", str(out), "--device", "cpu"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WITHOUT + MAIN, *arguments],
            env=without_ranks() | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in ranks]
    assert sorted(process.returncode for process in ranks) == [0, 1], said
    assert all("5/5 images" in text for text in said), said
    assert sum("1 of 5 images could not be predicted" in text for text in said) == 1
    assert not list(out.glob(".*"))
    assert len(list(out.glob("ids/**/*.png"))) == len(list(out.glob("overlay/**/*.jpg"))) == 9
    (failed,) = out.glob("failed*.jsonl")
    assert failed.name in ("failed-rank-0.jsonl", "failed-rank-1.jsonl")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "photos"}, "neither a run nor an export"),
        ({"inputs": ["nowhere"]}, "nowhere: no such file"),
        ({"inputs": ["empty"]}, "empty: no image"),
        ({"inputs": ["photos/a.png", "evaluation.mode=hole"]}, 'evaluation.mode="hole"'),
        ({"inputs": ["evaluation.mode=whole"]}, "no INPUT"),
        ({"out": "photos/a.png"}, "it is a file"),
        ({"out": "photos"}, "an input itself"),
        ({"out": "foreign"}, "has files, but none of `maskmatch predict`"),
        ({"options": ["--device", "gpu"]}, "--device gpu"),
        ({"options": ["--device", "cuda:99"]}, "--device cuda:99"),
        ({"options": ["--precision", "fp8"]}, "--precision fp8"),
        ({"options": ["--weights", "best"]}, "--weights best"),
        ({"options": ["--weights", "student"]}, "has the weights ema alone"),
        ({"options": ["--polygons", "svg"]}, "--polygons svg"),
        ({"options": ["--overlay-px", "70000"]}, "--overlay-px 70000: at most 60000"),
        ({"options": ["evaluation.scales=[0.1]"]}, "smaller than a unit"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(export, photos, tmp_path, monkeypatch, maskmatch, change, said):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("foreign").mkdir()
    Path("foreign/mine.txt").write_text("mine")
    before = written(tmp_path)
    code, _, err = maskmatch(
        "predict",
        change.get("model", export),
        *change.get("inputs", ["photos"]),
        "--out",
        change.get("out", "out"),
        *change.get("options", []),
    )
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert written(tmp_path) == before
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["grey", "palette"])
def test_label_maps_are_refused(export, photos, tmp_path, maskmatch, kind):
    (photos / "labels").mkdir()
    label = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3)
    if kind == "palette":
        label.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    label.save(photos / "labels" / "0.png")
    code, _, err = maskmatch("predict", export, photos, "--out", tmp_path / "out")
    assert code == 2
    assert "labels/0.png: this looks like a label map" in err
    assert not (tmp_path / "out").exists()


def test_dark_photos_are_no_label_maps_of_many_classes(tmp_path):
    palette = tuple((value, value, value) for value in range(150))
    Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)).save(tmp_path / "dark.png")
    refuse_label_maps([ImageFile(str(tmp_path / "dark.png"))], palette)
    Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10) % 32).save(tmp_path / "dark.png")
    with pytest.raises(UserError, match="looks like a label map"):
        refuse_label_maps([ImageFile(str(tmp_path / "dark.png"))], palette)


def test_what_may_be_a_label_map_is_said(export, tmp_path, maskmatch, monkeypatch):
    """One of values that the model has no class for; pages of text and photos are not like that."""
    monkeypatch.chdir(tmp_path)
    blocks = np.zeros((200, 200), np.uint8)
    blocks[40:120, 60:150] = 200
    draw = np.random.default_rng(0)
    text = np.where(draw.random((200, 200)) < 0.05, 0, 255).astype(np.uint8)
    for name, pixels in {"masks": blocks, "text": text, "grey": draw.integers(0, 255, (200, 200), np.uint8)}.items():
        Path(name).mkdir()
        Image.fromarray(pixels).save(f"{name}/0.png")
    code, _, err = maskmatch("predict", export, "masks", "text", "grey", "--out", "out")
    assert code == 0
    assert err.count("note: ") == 1
    assert f"note: {tmp_path}/masks/0.png may be a label map" in err


def test_black_and_white_pictures_are_no_label_maps(export, tmp_path, maskmatch):
    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(tmp_path / "page.png")
    Image.fromarray(np.eye(64, dtype=np.uint8) > 0).save(tmp_path / "bits.png")
    assert maskmatch("predict", export, tmp_path / "*.png", "--out", tmp_path / "out")[0] == 0


def test_a_full_disk_is_one_line_and_leaves_no_half_file(export, photos, small_disk, maskmatch):
    disk = small_disk(kib=64)
    code, _, err = maskmatch("predict", export, photos, "--out", disk.path / "out")
    assert code == 2
    assert "no room is left on this disk" in err
    assert "Traceback" not in err
    assert not list(disk.path.rglob("*.new"))
