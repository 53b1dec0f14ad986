"""Full and read-only disks, for every command that writes: one line that names the file, and nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.export import load_export
from maskmatch_scale.train import train
from tests.conftest import recipe_maker

FULL, READ_ONLY = "no room is left on this disk", "this disk is read-only"


def check_refused(result, file, reason):
    """One line that names the file and the reason, and exit code 2."""
    code, _, err = result
    (line,) = [line for line in err.splitlines() if line.startswith("maskmatch: error: ")]
    assert line.startswith(f"maskmatch: error: {file}: {reason}"), err
    assert (code, "Traceback" in err) == (2, False)


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    recipe = recipe_maker(shapes, folder)(run={"steps": 1}, engine={"precision": "fp32"})
    return train(recipe)


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(draw.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(folder / f"{number:02d}.jpg")
    return folder


def test_shards_that_do_not_fit_are_written_on_when_there_is_room(maskmatch, small_disk, photographs, tmp_path):
    write = ("shards", "write", "folder", photographs, "--workers", "1")
    assert maskmatch(*write, tmp_path / "whole")[0] == 0
    disk = small_disk(256)
    out, inode = disk.path / "out", None
    for leave in (0, 4096, 8192, 16384, 32768, 65536):
        disk.fill(leave)
        code, _, err = maskmatch(*write, out)
        disk.free()
        assert code == 2
        assert "Traceback" not in err
        assert f"{disk.path}/out" in err
        assert FULL in err
        assert not (out / "index.json").exists()
        assert not list(out.glob(".unlabelled-*")), "what was begun takes the room of a whole shard"
        first = out / "unlabelled-000000.tar"
        if first.exists():
            assert inode in (None, first.stat().st_ino), "a shard that was written must not be written again"
            inode = first.stat().st_ino
    assert inode is not None
    assert maskmatch(*write, out)[0] == 0
    assert inode == (out / "unlabelled-000000.tar").stat().st_ino
    assert ShardIndex.load(out) == ShardIndex.load(tmp_path / "whole")


def test_shards_on_a_read_only_disk(maskmatch, small_disk, photographs, shapes):
    disk = small_disk()
    disk.make_read_only()
    out = disk.path / "out"
    check_refused(maskmatch("shards", "write", "folder", photographs, out), out, READ_ONLY)
    check_refused(maskmatch("shards", "index", shapes / "unlabelled-*.tar", out), out, READ_ONLY)
    check_refused(maskmatch("shards", "show", shapes, "--out", out / "sheet.png"), out, READ_ONLY)


def test_an_index_and_a_contact_sheet_that_do_not_fit(maskmatch, small_disk, shapes):
    disk = small_disk()
    out = disk.path / "out"
    index = ("shards", "index", shapes / "unlabelled-*.tar", out, "--workers", "1")
    disk.fill()
    check_refused(maskmatch(*index), out / ".survey.jsonl", FULL)
    disk.free()
    disk.fill(leave=4096)
    check_refused(maskmatch(*index), out / "index.json", FULL)
    assert not (out / "index.json").exists()
    check_refused(maskmatch("shards", "show", shapes, "--out", out / "sheet.png"), out / "sheet.png", FULL)
    assert [path.name for path in out.iterdir()] == [".survey.jsonl"]
    disk.free()
    assert maskmatch(*index)[0] == 0
    assert ShardIndex.load(out).streams["unlabelled"].samples == 24


def test_an_export_is_complete_or_not_there(maskmatch, small_disk, trained):
    disk = small_disk(1200)
    out = disk.path / "above" / "out"
    for leave in (0, 4096, 65536):
        disk.fill(leave)
        check_refused(maskmatch("export", trained, out), out, FULL)
        assert list((disk.path / "above").iterdir()) == []
        disk.free()
    assert maskmatch("export", trained, out)[0] == 0
    load_export(out)
    disk.make_read_only()
    check_refused(maskmatch("export", trained, disk.path / "again"), disk.path / ".again.writing", READ_ONLY)


def test_a_report_that_does_not_fit(maskmatch, small_disk, trained):
    disk = small_disk()
    page, rows = disk.path / "report.html", disk.path / "rows.json"
    page.write_text("the one before")
    disk.fill()
    check_refused(maskmatch("report", trained, "--out", page), page, FULL)
    check_refused(maskmatch("report", trained, "--json", rows), rows, FULL)
    assert page.read_text() == "the one before"
    assert not rows.exists()
    disk.make_read_only()
    check_refused(maskmatch("report", trained, "--out", page), page, READ_ONLY)


def test_an_evaluation_that_does_not_fit(maskmatch, small_disk, trained):
    disk = small_disk()
    for name in ("evaluation", "pictures"):
        (trained / name).symlink_to(disk.path / name)
        (disk.path / name).mkdir()
    disk.fill()
    evaluate = ("evaluate", trained, "--weights", "ema", "--json")
    check_refused(maskmatch(*evaluate), trained / "evaluation" / "val-ema.json", FULL)
    assert list((disk.path / "evaluation").iterdir()) == []
    disk.free()
    disk.fill(leave=16384)  # figures, and less than the pictures of one sample
    code, _, err = maskmatch(*evaluate)
    assert (code, FULL in err, "Traceback" in err) == (2, True, False)
    assert json.loads((trained / "evaluation" / "val-ema.json").read_bytes())["step"] == 1
    for picture in disk.path.rglob("*.png"):
        Image.open(picture).load()
    assert maskmatch("report", trained)[0] == 0


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"], ["shards", "verify", "SHAPES"], ["--version"]])
def test_standard_output_on_a_full_disk(shapes, arguments):
    arguments = [str(shapes) if argument == "SHAPES" else argument for argument in arguments]
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "maskmatch_scale", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    check_refused((done.returncode, "", done.stderr), "standard output", FULL)
    assert done.stderr.count("\n") == 1
