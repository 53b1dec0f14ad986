"""A checkpoint is there whole or not at all, and what goes wrong is told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from maskmatch_scale.checkpoints import parts, writing
from maskmatch_scale.checkpoints.finding import find
from maskmatch_scale.checkpoints.pieces import Piece
from maskmatch_scale.checkpoints.reading import StoredTensors, being_read
from maskmatch_scale.checkpoints.writing import CheckpointWriter
from tests.checkpoints.made_up import SETTINGS, STATE, cut, read_all, same, write


def test_what_is_there_afterwards(tmp_path):
    outcome = write(tmp_path, 400, cut(STATE, {}, 2))
    assert outcome.folder == tmp_path / "step-00000400"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000400"]
    assert (tmp_path / "latest").read_text() == "step-00000400"
    names = ["index.json", "part-00000-of-00002.safetensors", "part-00001-of-00002.safetensors"]
    assert sorted(path.name for path in outcome.folder.iterdir()) == [*names, "state.json", "stream.json"]
    assert json.loads((outcome.folder / "state.json").read_text()) == SETTINGS | {"world_size": 2, "step": 400}
    files = json.loads((outcome.folder / "index.json").read_text())["content"]["files"]
    assert outcome.bytes == sum((outcome.folder / name).stat().st_size for name in files)
    assert files.keys() == {path.name for path in outcome.folder.iterdir()} - {"index.json"}


def test_what_ranks_add_to_the_state_of_the_batches(tmp_path):
    """Nobody else knows it: it goes with the reports on their parts, and is under the checksum of `stream.json`."""
    write(tmp_path, 3, cut(STATE, {}, 3), own_streams=[{"a": 1}, None, {"a": 3}])
    assert find(tmp_path / "step-00000003").stream() == {"format": 1, "step": 3, "ranks": [{"a": 1}, None, {"a": 3}]}
    write(tmp_path, 4, cut(STATE, {}, 3))
    assert find(tmp_path / "step-00000004").stream() == {"format": 1, "step": 4}


def test_the_state_may_change_while_it_is_written(tmp_path, monkeypatch):
    """Only the copy is waited for."""
    go = threading.Event()
    write_part = parts.write_part
    monkeypatch.setattr(writing, "write_part", lambda *arguments: go.wait(30) and write_part(*arguments))
    values = torch.arange(8.0)
    writer = CheckpointWriter(tmp_path, 0, 1, HashStore(), 30)
    writer.save(1, [Piece("student/a", (8,), 0, values)], {}, {})
    assert writer.is_writing
    assert not (tmp_path / "latest").exists()
    values.zero_()
    go.set()
    outcome = writer.wait()
    assert not writer.is_writing
    assert outcome is not None
    assert StoredTensors(outcome.folder).read("student/a").equal(torch.arange(8.0))
    assert writer.newest() == outcome.folder
    # The memory of the copies is used again.
    writer.save(2, [Piece("student/a", (8,), 0, values)], {}, {})
    assert StoredTensors(writer.newest()).read("student/a").equal(torch.zeros(8))


def test_pieces_that_do_not_make_the_whole_are_refused(tmp_path):
    for wrong in (
        [Piece("student/a", (8,), 0, torch.zeros(4))],
        [Piece("student/a", (8,), 0, torch.zeros(8)), Piece("student/a", (8,), 4, torch.zeros(4))],
        [Piece("student/a", (8,), 4, torch.zeros(4))],
    ):
        outcome = write(tmp_path, pieces=[wrong])
        assert outcome.error is not None
        assert "student/a" in outcome.error
    outcome = write(
        tmp_path, pieces=[[Piece("a", (8,), 0, torch.zeros(4))], [Piece("a", (8,), 4, torch.zeros(4).double())]]
    )
    assert "F64" in str(outcome.error)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_cannot_write_stops_the_checkpoint_for_all(tmp_path, monkeypatch):
    write(tmp_path, 1)
    write_part = parts.write_part

    def full(path, pieces):
        if path.name.startswith("part-00001"):
            path.write_bytes(b"half")
            raise OSError(28, os.strerror(28), str(path))
        return write_part(path, pieces)

    monkeypatch.setattr(writing, "write_part", full)
    outcome = write(tmp_path, 2, cut(STATE, {}, 3))
    assert "rank 1 on" in str(outcome.error)
    assert "No space left on device" in str(outcome.error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001"


def test_a_rank_that_says_nothing_is_not_waited_for_for_ever(tmp_path):
    writer = CheckpointWriter(tmp_path, 0, 2, HashStore(), 0.2)
    writer.save(1, cut(STATE, {}, 2)[0], {}, {})
    outcome = writer.wait()
    assert outcome is not None
    assert "rank 1 did not write its part within 0 s" in str(outcome.error)
    assert list(tmp_path.iterdir()) == []


def test_rank_0_that_says_nothing_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_MARGIN_S", 0.1)
    writer = CheckpointWriter(tmp_path, 1, 2, HashStore(), 0.2)
    writer.save(1, cut(STATE, {}, 2)[1], {}, {})
    outcome = writer.wait()
    assert outcome is not None
    assert "rank 0 did not answer" in str(outcome.error)


def test_ranks_on_other_disks_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_APPEARS_S", 0.1)
    elsewhere = tmp_path / "elsewhere"
    store = HashStore()
    dealt = cut(STATE, {}, 2)
    number = next(writing._NUMBERS)
    monkeypatch.setattr(writing, "_NUMBERS", iter([number, number]))
    writers = [CheckpointWriter(tmp_path / "here", 0, 2, store, 30), CheckpointWriter(elsewhere, 1, 2, store, 30)]
    for writer, pieces in zip(writers, dealt, strict=True):
        writer.save(1, pieces, {}, {})
    for writer in writers:
        assert "run.dir must be on a disk that all ranks share" in str(writer.wait().error)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 3, cut(STATE, {}, 2))
    # A job of two ranks was killed while it wrote the same step.
    leftover = tmp_path / ".step-00000003.writing"
    leftover.mkdir()
    (leftover / "part-00001-of-00002.safetensors").write_bytes(b"half")
    for name in (".step-00000002.writing", ".step-00000001.deleted", ".step-00000003.replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / ".latest.1.new").write_text("")
    outcome = write(tmp_path, 3, cut({"student/a": torch.ones(2)}, {}, 1))
    assert same(read_all(StoredTensors(outcome.folder)), {"student/a": torch.ones(2)})
    assert len(list(outcome.folder.glob("part-*"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def one(value):
    return cut({"student/a": torch.full((2,), value)}, {}, 1)


@pytest.mark.parametrize("there", [True, False])
def test_if_latest_cannot_be_written_everything_is_as_before(tmp_path, there):
    """Else a checkpoint of a later step would be there that `latest` passes over."""
    write(tmp_path, 1, one(1.0))
    if there:
        write(tmp_path, 2, one(2.0))
    before = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "latest").unlink()
    (tmp_path / "latest" / "in the way").mkdir(parents=True)
    assert str(tmp_path / "latest") in str(write(tmp_path, 2, one(3.0)).error)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    if there:
        assert same(read_all(StoredTensors(tmp_path / "step-00000002")), {"student/a": torch.full((2,), 2.0)})


def test_a_checkpoint_that_is_being_read_is_not_replaced(tmp_path):
    folder = write(tmp_path, 2, one(2.0)).folder
    with being_read(folder):
        assert str(write(tmp_path, 2, one(3.0)).error) == f"an older {folder} is being read"
    assert same(read_all(StoredTensors(folder)), {"student/a": torch.full((2,), 2.0)})
    assert write(tmp_path, 2, one(3.0)).error is None


@pytest.mark.parametrize("fails", [False, True])
def test_how_it_ended_is_what_rank_0_says(tmp_path, monkeypatch, fails):
    """Rank 1 has written its part long before rank 0, and gives up."""
    monkeypatch.setattr(writing, "_MARGIN_S", 0.1)
    number = next(writing._NUMBERS)
    monkeypatch.setattr(writing, "_NUMBERS", iter([number, number]))
    write_part, rank_1_is_done = parts.write_part, threading.Event()

    def slow(path, pieces):
        if path.name.startswith("part-00000"):
            assert rank_1_is_done.wait(60)
            if fails:
                raise OSError(28, os.strerror(28))
        return write_part(path, pieces)

    monkeypatch.setattr(writing, "write_part", slow)
    store, said = HashStore(), []
    writers = [
        CheckpointWriter(tmp_path, 0, 2, store, 0.1, agreed=lambda error: said.append(error) or error),
        CheckpointWriter(tmp_path, 1, 2, store, 0.1, agreed=lambda error: said.append(error) or said[0]),
    ]
    for writer, pieces in zip(writers, cut(STATE, {}, 2), strict=True):
        writer.save(1, pieces, {}, {})
    writers[1].join(60)
    rank_1_is_done.set()
    outcomes = [writer.wait() for writer in writers]
    assert "rank 0 did not answer" in said[1]
    assert outcomes[1].error == outcomes[0].error == (said[0] or None)
    assert ("No space left on device" in said[0]) == fails
    assert writers[1].newest() == writers[0].newest() == (None if fails else tmp_path / "step-00000001")


KILLED = """
import sys, time
from pathlib import Path
import torch
from torch.distributed import HashStore
from maskmatch_scale.checkpoints import parts, writing
from maskmatch_scale.checkpoints.pieces import Piece
from maskmatch_scale.checkpoints.writing import CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]), 0, 1, HashStore(), 30)
for step in range(int(sys.argv[2]), 100000):
    values = torch.full((400_000,), float(step))
    writer.save(step, [Piece("student/a", (400_000,), 0, values)], {}, {})
    assert writer.wait().error is None
    print(step, flush=True)
"""


def test_killed_at_any_moment_of_a_save(tmp_path):
    """After each kill the newest complete checkpoint is one that was told, or the one after it."""
    import random

    moments, step = random.Random(3), 1
    for _ in range(3):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(step)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
            told = int(job.stdout.readline())
            time.sleep(moments.uniform(0, 0.05))
            job.send_signal(signal.SIGKILL)
            told = max([told, *map(int, job.stdout.read().split())])
        found = find(tmp_path).folder
        step = json.loads((found / "state.json").read_text())["step"]
        assert step in (told, told + 1)
        assert StoredTensors(found).read("student/a").equal(torch.full((400_000,), float(step)))
        step += 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk(tmp_path):
    """A real one, of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        small, large = {"student/a": torch.ones(1000)}, {"student/a": torch.ones(10**6)}
        write(disk, 1, cut(small, {}, 2))
        outcome = write(disk, 2, cut(large, {"student/a": [100]}, 2))
        assert "No space left on device" in str(outcome.error)
        assert same(read_all(StoredTensors(find(disk).folder)), small)
        assert sorted(path.name for path in disk.iterdir()) == ["latest", "step-00000001"]
        assert write(disk, 3, cut(small, {}, 2)).error is None
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert "Read-only file system" in str(write(disk, 4, cut(small, {}, 2)).error)
        assert find(disk).folder.name == "step-00000003"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_processes(tmp_path):
    """Two ranks with torch's own store between them."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from torch.distributed import TCPStore
from maskmatch_scale.checkpoints.writing import CheckpointWriter
from tests.checkpoints.made_up import SETTINGS, STATE, cut
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = TCPStore("127.0.0.1", port, 2, is_master=rank == 0, wait_for_workers=False)
writer = CheckpointWriter(Path({str(tmp_path)!r}), rank, 2, store, 60)
for step in (1, 2, 3):
    writer.save(step, cut(STATE, {{"student/backbone.weight": [step]}}, 2)[rank], {{}}, {{}})
    assert writer.wait().error is None
store.set(f"left/{{rank}}", "")
store.wait([f"left/{{other}}" for other in range(2)])
"""
    from maskmatch_scale.engine.setup import _free_port

    port = str(_free_port())
    jobs = [subprocess.Popen([sys.executable, "-c", program, str(rank), port]) for rank in range(2)]
    assert [job.wait(120) for job in jobs] == [0, 0]
    for step in (1, 2, 3):
        folder = tmp_path / f"step-{step:08d}"
        assert same(read_all(StoredTensors(folder)), STATE)
        assert len(list(folder.glob("part-0000?-of-00002.safetensors"))) == 2
