"""Folders written anew: only what a writer has made is deleted."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.writing import Part, merge_shards, overwrite, write_shards
from tests.data.writing.squares import Squares, contents


def write(source: Squares, out: Path, **options) -> ShardIndex:
    return write_shards(source, out, workers=1, progress=False, **options)


def begun(tmp_path: Path) -> Path:
    """A folder that a writer with another seed was killed in, with a file of the user's."""
    source = Squares(seed=1, unlabelled=40, kill_at=12, kill_file=str(tmp_path / "killed"))
    process = multiprocessing.get_context("spawn").Process(
        target=write_shards, args=(source, tmp_path / "out"), kwargs={"workers": 1, "progress": False}
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (tmp_path / "out" / "notes.txt").write_text("mine")
    return tmp_path / "out"


def expected(tmp_path: Path) -> dict[str, bytes]:
    write(Squares(), tmp_path / "whole")
    return {**contents(tmp_path / "whole"), "notes.txt": b"mine"}


def test_a_folder_that_was_begun(tmp_path: Path) -> None:
    out = begun(tmp_path)
    before = contents(out)
    with pytest.raises(DataError, match=r"out: was begun with seed=1, but seed=0 .* another folder, or --overwrite"):
        write(Squares(), out)
    assert contents(out) == before
    write(Squares(), out, overwrite=True)
    assert contents(out) == expected(tmp_path)


def test_a_finished_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(Squares(seed=1, unlabelled=40, bad=(2,)), out, skip_bad=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds shards written with seed=1, but seed=0 .*--overwrite"):
        write(Squares(), out)
    write(Squares(), out, overwrite=True)
    assert contents(out) == expected(tmp_path)


def _overwrite_and_die(out: Path, at: int) -> None:
    """`at`: how many files are deleted before this process is killed."""
    plain = Path.unlink
    deleted = []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if len(deleted) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(path, missing_ok)
        deleted.append(path)

    overwrite.Path.unlink = unlink
    write(Squares(), out, overwrite=True)


@pytest.mark.parametrize("at", [0, 1, 9, 30])
def test_killed_while_it_deletes(tmp_path: Path, at: int) -> None:
    out = tmp_path / "out"
    write(Squares(seed=1, unlabelled=40), out)
    (out / "notes.txt").write_text("mine")
    process = multiprocessing.get_context("fork").Process(target=_overwrite_and_die, args=(out, at))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    write(Squares(), out, overwrite=True)
    assert contents(out) == expected(tmp_path)


def test_shards_of_others_stay(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "labelled-000007.tar").write_bytes(b"theirs")
    with pytest.raises(DataError, match=r"labelled-000007\.tar: exists"):
        write(Squares(), theirs, overwrite=True)
    out = begun(tmp_path)
    (out / "labelled-000099.tar").write_bytes(b"theirs")  # no journal names it
    with pytest.raises(DataError, match=r"labelled-000099\.tar: exists"):
        write(Squares(), out, overwrite=True)
    assert (out / "labelled-000099.tar").read_bytes() == b"theirs"


def test_data_sets_that_were_merged_stay(tmp_path: Path) -> None:
    write(Squares(seed=1), tmp_path / "a")
    merge_shards([tmp_path / "a"], tmp_path / "out", progress=False)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="--overwrite does not delete them"):
        write(Squares(), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_a_part(tmp_path: Path) -> None:
    write(Squares(seed=1), tmp_path / "a", part=Part(1, 2))
    write(Squares(), tmp_path / "a", part=Part(1, 2), overwrite=True)
    write(Squares(), tmp_path / "b", part=Part(2, 2))
    merge_shards([tmp_path / "a", tmp_path / "b"], tmp_path / "out", progress=False)
    write(Squares(), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
