"""`maskmatch shards write --part | --append | --overwrite` and `shards merge` as a user runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.cli import main as cli
from maskmatch_scale.data.shards.index import ShardIndex


@pytest.fixture
def run(capsys, monkeypatch):
    """`maskmatch …`: exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["maskmatch", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def draw(folder: Path, numbers: range) -> Path:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return folder


def test_parts_merged_and_appended(run, tmp_path: Path, make_recipe) -> None:
    (tmp_path / "recipe.yaml").write_text(make_recipe(data={"root": str(tmp_path / "1")}).to_yaml())
    photos = draw(tmp_path / "photos", range(9))
    write = ("shards", "write", "folder", photos)
    for number in (1, 2):
        code, out, _ = run(*write, tmp_path / f"{number}", "--part", f"{number}/2", "--workers", 1)
        assert (code, f"only part {number}/2" in " ".join(out.split())) == (0, True)
    assert run("shards", "verify", tmp_path / "1")[0] == 0
    code, _, err = run("train", tmp_path / "recipe.yaml")
    assert (code, err.count("\n"), "only part 1/2 of a data set; put all parts together" in err) == (2, 1, True)
    code, _, err = run("shards", "merge", tmp_path / "1", "--out", tmp_path / "out")
    assert (code, err.count("\n"), "part 2/2 missing" in err) == (2, 1, True)
    code, out, _ = run(
        "shards", "merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "out", "--move", "--check"
    )
    assert (code, "unlabelled" in out, list((tmp_path / "2").glob("*.tar"))) == (0, True, [])
    draw(photos, range(9, 11))
    code, _, err = run(*write, tmp_path / "out", "--workers", 1)
    assert (code, err.count("\n"), "--append writes only the images that are new" in err) == (2, 1, True)
    code, _, err = run(*write, tmp_path / "out", "--append", "--workers", 1)
    assert (code, "appended: 2 unlabelled" in err) == (0, True)
    code, _, err = run(*write, tmp_path / "out", "--append", "--workers", 1)
    assert (code, "appended: nothing, no image is new" in err) == (0, True)
    assert ShardIndex.load(tmp_path / "out").streams["unlabelled"].samples == 11


def test_overwrite(run, tmp_path: Path) -> None:
    write = ("shards", "write", "folder", draw(tmp_path / "photos", range(4)), tmp_path / "out", "--workers", 1)
    assert run(*write)[0] == 0
    code, _, err = run(*write, "--shuffle-seed", 1)
    assert (code, err.count("\n"), "or --overwrite deletes" in err) == (2, 1, True)
    assert run(*write, "--shuffle-seed", 1, "--overwrite")[0] == 0
    assert ShardIndex.load(tmp_path / "out").settings["shuffle_seed"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("write", "folder", "photos", "out", "--part", "3/2"), "--part 3/2: write I/N"),
        (("write", "folder", "photos", "out", "--part", "1/2", "--append"), "--append and --part exclude each other"),
        (("merge", "a", "b", "--out", "c", "--move", "--copy"), "--move and --copy exclude each other"),
        (("merge", "a", "a", "--out", "c"), "a: named twice"),
        (("merge", "a", "--out", "c"), "a: no such folder"),
    ],
)
def test_mistakes(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photos", range(1))
    code, _, err = run("shards", *arguments)
    assert (code, err.count("\n"), message in err) == (2, 1, True)
