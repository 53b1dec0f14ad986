"""Arrays that processes share: made once, whole or not at all, and in memory where the disk does not take them."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.data import node_arrays
from maskmatch_scale.data.node_arrays import NodeArrays
from maskmatch_scale.data.remote import cache_place
from tests.data.remote.common import FORK, in_processes, wait_until

ARRAYS = {"x": np.arange(1000), "none": np.zeros(0, np.uint8), "some": np.array([True, False]), "text": b"\x93abc"}
ARRAYS["text"] = np.frombuffer(ARRAYS["text"], np.uint8)


def same(found, wanted=ARRAYS):
    return found.keys() == wanted.keys() and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array) for name, array in wanted.items()
    )


def is_mapped(found):
    return all(isinstance(array, node_arrays._Mapped) and not array.flags.writeable for array in found.values())


def unmade():
    raise AssertionError("they are there already")


@pytest.fixture
def arrays(tmp_path):
    return NodeArrays(tmp_path / "cache" / "arrays")


@pytest.fixture(autouse=True)
def warned_anew(monkeypatch):
    monkeypatch.setattr(node_arrays, "_warned", set())
    node_arrays._is_shared_by_machines.cache_clear()


def test_made_once_then_mapped(arrays):
    assert is_mapped(found := arrays.get("a", "0", lambda: ARRAYS, most=3))
    assert same(found)
    assert same(arrays.get("a", "0", unmade, most=3))
    assert [path.name for path in arrays.folder.iterdir()] == ["a-0.safetensors"]
    assert (arrays.folder / "a-0.safetensors").stat().st_mode & 0o777 == 0o600  # addresses in it may have secrets


def test_on_a_network_they_are_read_into_memory(arrays, tmp_path, monkeypatch):
    """Where another machine may take away what is mapped: a process that touches it then ends by SIGBUS."""
    (tmp_path / "mounts").write_text(f"server {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr(cache_place, "_MOUNTS", tmp_path / "mounts")
    large = {"x": np.arange(100_000)}
    arrays.get("a", "0", lambda: large, most=3)

    def work(_number):
        found = arrays.get("a", "0", unmade, most=3)
        os.truncate(arrays.folder / "a-0.safetensors", 0)
        assert same(found, large)

    assert in_processes(1, work) == [0]


columns = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from([np.int64, np.uint8, np.bool_]), st.integers(0, 50), st.integers(0, 255)),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=40)  # each writes to a disk
@given(columns)
def test_any_columns(described):
    made = {name: (np.arange(size) * factor).astype(dtype) for name, (dtype, size, factor) in described.items()}
    with tempfile.TemporaryDirectory() as folder:
        found = NodeArrays(Path(folder)).get("a", "0", lambda: made, most=1)
        assert is_mapped(found)
        assert same(found, made)
        assert all(array.ctypes.data % array.dtype.itemsize == 0 for array in found.values() if array.size)


def test_processes_that_race_make_them_once(arrays, tmp_path):
    """Real processes, all of which find nothing and begin at the same time."""
    start, notes = FORK.Barrier(4), tmp_path / "notes"

    def make():
        with notes.open("a") as file:
            file.write("made\n")
        time.sleep(0.2)
        return ARRAYS

    def work(_number):
        start.wait()
        found = arrays.get("a", "0", make, most=3)
        assert is_mapped(found)
        assert same(found)

    assert in_processes(4, work) == [0] * 4
    assert notes.read_text() == "made\n"


@pytest.mark.parametrize("where", ["make", "write"])
def test_a_maker_that_is_killed(arrays, tmp_path, where):
    """While another process waits for it. Half a file is left where it wrote, which the next maker removes."""
    at_work = tmp_path / "at work"

    def stop(*_):
        at_work.touch()
        time.sleep(60)

    def be_killed():
        if where == "write":
            os.fsync = stop
        arrays.get("a", "0", lambda: ARRAYS if where == "write" else stop(), most=3)

    killed = FORK.Process(target=be_killed)
    killed.start()
    wait_until(at_work.exists)
    waiting = FORK.Process(target=lambda: sys.exit(not same(arrays.get("a", "0", lambda: ARRAYS, most=3))))
    waiting.start()
    left = len(list(arrays.folder.glob(".*.new")))
    assert left == (where == "write")
    os.kill(killed.pid, signal.SIGKILL)
    for process in (killed, waiting):
        process.join()
    assert waiting.exitcode == 0
    assert [path.name for path in arrays.folder.iterdir()] == ["a-0.safetensors"]


def test_what_killed_makers_of_other_files_have_left(arrays):
    """Nobody may ever ask for the same ones again."""
    arrays.folder.mkdir(parents=True)
    left, written = (arrays.folder / f".a-{number}.safetensors.0123abcd.new" for number in range(2))
    for path in (left, written):
        path.write_bytes(b"half")
    os.utime(left, (time.time() - 4000,) * 2)
    arrays.get("a", "2", lambda: ARRAYS, most=3)
    assert sorted(arrays.folder.iterdir()) == [written, arrays.folder / "a-2.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"12345678", b"\xff" * 200, "shorter", "header"])
def test_a_damaged_file_is_made_again(arrays, damage):
    arrays.get("a", "0", lambda: ARRAYS, most=3)
    path = arrays.folder / "a-0.safetensors"
    whole = path.read_bytes()
    if damage == "shorter":
        damage = whole[:-600]
    elif damage == "header":
        damage = whole.replace(b'"I64"', b'"F99"')
    path.write_bytes(damage)
    made = []
    assert same(arrays.get("a", "0", lambda: made.append(1) or ARRAYS, most=3))
    assert made == [1]
    assert path.read_bytes() == whole


def test_no_room_on_the_disk(small_disk, caplog):
    """A real full disk, and one that becomes read-only: each process has the arrays in memory, and says so once."""
    disk = small_disk(kib=64)
    arrays = NodeArrays(disk.path / "arrays")
    arrays.get("a", "0", lambda: ARRAYS, most=3)
    disk.fill()
    for key in "12":
        found = arrays.get("a", key, lambda: ARRAYS, most=3)
        assert same(found)
        assert not is_mapped(found)
    assert len(caplog.messages) == 1
    assert "arrays/a-1.safetensors: no room is left on this disk" in caplog.messages[0]
    assert "data.cache_dir" in caplog.messages[0]
    assert [path.name for path in arrays.folder.iterdir()] == ["a-0.safetensors"]
    disk.free()
    assert is_mapped(arrays.get("a", "1", lambda: ARRAYS, most=3))
    disk.make_read_only()
    assert is_mapped(arrays.get("a", "1", unmade, most=3))  # what is there can still be mapped
    assert same(arrays.get("a", "2", lambda: ARRAYS, most=3))


def test_a_folder_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    arrays = NodeArrays(tmp_path / "cache" / "arrays")
    for _ in range(2):
        assert same(arrays.get("a", "0", lambda: ARRAYS, most=3))
    assert len(caplog.messages) == 1
    assert "a file stands where a folder is needed" in caplog.messages[0]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no such file", "index.json"), KeyboardInterrupt()])
def test_what_making_them_raises_is_raised(arrays, error):
    def make():
        raise error

    with pytest.raises(type(error)):
        arrays.get("a", "0", make, most=3)
    assert list(arrays.folder.iterdir()) == []
    assert same(arrays.get("a", "0", lambda: ARRAYS, most=3))


def test_the_least_recently_opened_are_removed(arrays, monkeypatch):
    def names():
        return sorted(path.name.split(".")[0] for path in arrays.folder.iterdir())

    def get(kind, key):
        found = arrays.get(kind, key, lambda: ARRAYS, most=2)
        time.sleep(0.01)
        return found

    first = get("order-x", "0")
    get("order-xy", "0")
    get("order-x", "1")
    get("order-x", "0")
    get("order-x", "2")
    assert names() == ["order-x-0", "order-x-2", "order-xy-0"]
    monkeypatch.setattr(node_arrays, "_MOST_BYTES", 2 * (arrays.folder / "order-x-0.safetensors").stat().st_size)
    get("order-z", "0")
    assert names() == ["order-x-2", "order-z-0"]
    assert same(first)  # who has mapped a file keeps it
    monkeypatch.setattr(node_arrays, "_MOST_BYTES", 1)
    assert is_mapped(get("order-z", "1"))
    assert names() == ["order-z-1"]


def test_another_process_maps_what_is_pickled(arrays):
    found = arrays.get("a", "0", lambda: ARRAYS, most=3)
    data = pickle.dumps(found)
    assert len(data) < 1000
    # A new process, which has inherited nothing.
    script = "import pickle, sys; x = pickle.load(sys.stdin.buffer)['x']; print(type(x).__name__, x.sum(), x.at[1])"
    ran = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert ran.stdout.decode().split() == ["_Mapped", "499500", "x"]
    part = pickle.loads(pickle.dumps(found["x"][3:5]))
    assert (type(part), part.tolist()) == (np.ndarray, [3, 4])
    (arrays.folder / "a-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="start again"):
        pickle.loads(data)
