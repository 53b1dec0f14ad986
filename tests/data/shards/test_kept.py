"""Numbers that are found once for all processes of a machine."""

import logging
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote import cache_place, file_locks
from maskmatch_scale.data.shards import kept
from maskmatch_scale.data.shards.kept import kept_numbers
from tests.data.remote.common import in_processes


def find(numbers=(3, 5, 8), calls=None, facts=None):
    def found(unfinished):
        if calls is not None:
            calls.append(1)
        return np.array(numbers, dtype=np.int64), facts or {"fault": None}

    return found


@pytest.mark.parametrize("numbers", [(), (3, 5, 8), range(1000), [(1, 2), (3, 4)]])
def test_found_once_and_read_then(tmp_path, numbers):
    calls = []
    for _ in range(3):
        got, facts = kept_numbers(tmp_path / "a/b", "x", find(numbers, calls, {"n": 1}), "looking")
        assert got.tolist() == np.array(numbers, dtype=np.int64).tolist()
        assert facts == {"n": 1}
    assert len(calls) == 1
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["x.json", "x.npy"]


def test_on_a_network_they_are_read_into_memory(tmp_path, monkeypatch):
    """What is mapped may be replaced there by another machine, which ends the process (SIGBUS)."""
    kept_numbers(tmp_path, "x", find(range(100_000)), "looking")

    def work(_number):
        got, _ = kept_numbers(tmp_path, "x", find(), "looking")
        os.truncate(tmp_path / "x.npy", 0)
        assert got.sum() == sum(range(100_000))

    (tmp_path / "mounts").write_text(f"server {tmp_path} lustre rw 0 0\n")
    monkeypatch.setattr(cache_place, "_MOUNTS", tmp_path / "mounts")
    assert in_processes(1, work) == [0]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"rubbish" * 100])
def test_damaged_files_are_found_again(tmp_path, damage):
    kept_numbers(tmp_path, "x", find(), "looking")
    (tmp_path / "x.npy").write_bytes(damage)
    got, _ = kept_numbers(tmp_path, "x", find((1, 2)), "looking")
    assert got.tolist() == [1, 2]
    (tmp_path / "x.json").write_text("[]")
    assert kept_numbers(tmp_path, "x", find((4,)), "looking")[0].tolist() == [4]


def test_what_fails_is_not_kept(tmp_path):
    def fail(unfinished):
        raise DataError("no")

    with pytest.raises(DataError):
        kept_numbers(tmp_path, "x", fail, "looking")
    assert list(tmp_path.iterdir()) == []
    assert kept_numbers(tmp_path, "x", find(), "looking")[0].tolist() == [3, 5, 8]


def test_a_folder_that_cannot_be_written_to(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    got, _ = kept_numbers(tmp_path / "file" / "x", "x", find(), "looking")
    assert got.tolist() == [3, 5, 8]
    assert "looking: " in caplog.text
    assert "not kept for other processes" in caplog.text


def test_what_was_found_so_far_is_there_for_the_next_start(tmp_path):
    def interrupted(unfinished):
        assert unfinished.read() is None
        unfinished.write(np.array([1, 2]), {"done": 2})
        unfinished.write(np.array([1, 2, 3]), {"done": 5})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_numbers(tmp_path, "x", interrupted, "looking")

    def going_on(unfinished):
        numbers, facts = unfinished.read()
        assert (numbers.tolist(), facts) == ([1, 2, 3], {"done": 5})
        # A process that is killed between the two files has more numbers than it says.
        np.save(tmp_path / "x.part.npy", np.array([1, 2, 3, 4]))
        assert unfinished.read()[0].tolist() == [1, 2, 3]
        np.save(tmp_path / "x.part.npy", np.array([1, 2]))
        assert unfinished.read() is None
        return np.array([1, 2, 3, 4]), {}

    assert kept_numbers(tmp_path, "x", going_on, "looking")[0].tolist() == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npy"]


def _slowly(folder, started):
    def slow(unfinished):
        started.set()
        time.sleep(60)
        return np.empty(0, np.int64), {}

    kept_numbers(folder, "x", slow, "looking")


def test_others_wait_and_one_takes_over_if_it_is_killed(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(kept, "_POLL_S", 0.02)
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_slowly, args=(tmp_path, started))
    process.start()
    assert started.wait(30)
    got = []
    with caplog.at_level(logging.WARNING):
        waiting = threading.Thread(target=lambda: got.append(kept_numbers(tmp_path, "x", find(), "looking")))
        waiting.start()
        while "another process of this machine does it" not in caplog.text:
            assert waiting.is_alive()
            time.sleep(0.01)
    assert not got
    assert file_locks.is_held(str(tmp_path / ".x.lock"))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiting.join(30)
    assert got[0][0].tolist() == [3, 5, 8]
