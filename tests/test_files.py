"""Files and folders are there whole, or as they were, and what a disk refuses is named in one line."""

import errno
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskmatch_scale.errors import UserError
from maskmatch_scale.files import append_lines, disk_fault, file_whole, folder_whole, write_whole, writing


@pytest.mark.parametrize("content", ["größer", b"\x00\xff"])
def test_a_file_is_written_and_replaced(tmp_path, content):
    path = tmp_path / "a.json"
    for expected in (content, "second"):
        write_whole(path, expected)
        assert path.read_bytes() == (expected.encode() if isinstance(expected, str) else expected)
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_of_a_file(tmp_path):
    write_whole(tmp_path / "secret", "a", mode=0o600)
    write_whole(tmp_path / "plain", "a")
    (tmp_path / "by hand").write_text("a")
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("secret", "plain", "by hand")]
    assert modes == [0o600, modes[2], modes[2]]


@contextmanager
def limited():
    """No file may grow beyond 4 KiB: a real fault of the disk that needs no root.

    Within the test alone: pytest's own output may be a file, which would be too long as well.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_whole_or_not_at_all(folder, number):
    """Write more than there is room for; ``folder`` has the files `.plan.json` and `lines`."""
    plan, lines = folder / ".plan.json", folder / "lines"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path, write in (
        (plan, lambda: write_whole(plan, b"x" * 100_000)),
        (lines, lambda: append_lines(lines, ["x" * 1000] * 100)),
        (folder / "none", lambda: append_lines(folder / "none", ["x" * 1000] * 100)),
    ):
        with pytest.raises(OSError) as caught:
            write()
        assert (caught.value.errno, caught.value.filename) == (number, str(path))
        fault = disk_fault(caught.value)
        assert fault is not None
        assert fault.startswith(f"{path}: ")
        assert "\n" not in fault
    if (folder / "none").exists():
        assert (folder / "none").read_bytes() == b""
        (folder / "none").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_that_is_too_large(tmp_path):
    write_whole(tmp_path / ".plan.json", "before")
    append_lines(tmp_path / "lines", ["before"])
    with limited():
        check_whole_or_not_at_all(tmp_path, errno.EFBIG)


def test_a_full_disk(small_disk):
    disk = small_disk(64)
    write_whole(disk.path / ".plan.json", "before")
    append_lines(disk.path / "lines", ["before"])
    disk.fill(leave=8192)
    check_whole_or_not_at_all(disk.path, errno.ENOSPC)
    append_lines(disk.path / "lines", ["after"])
    assert (disk.path / "lines").read_text() == "before\nafter\n"


def test_a_read_only_disk(small_disk):
    disk = small_disk(64)
    (disk.path / ".plan.json").write_text("before")
    (disk.path / "lines").write_text("before")
    disk.make_read_only()
    check_whole_or_not_at_all(disk.path, errno.EROFS)


AS_NOBODY = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from maskmatch_scale.files import disk_fault, write_whole
os.setgid(65534), os.setuid(65534)
try:
    write_whole(Path(sys.argv[1], "file"), b"x" * 60_000)
except OSError as error:
    print(disk_fault(error))
"""


def as_nobody(folder):
    """What a user without rights is told when he writes a file into ``folder``."""
    for parent in folder.parents:  # to be passed through
        if "pytest-of-" in str(parent):
            parent.chmod(parent.stat().st_mode | 0o011)
    command = [sys.executable, "-c", AS_NOBODY, folder, str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_quota(small_disk):
    disk = small_disk(1024, "usrquota,usrquota_block_hardlimit=16k")
    disk.path.chmod(0o777)
    said = as_nobody(disk.path)
    assert said.startswith(f"{disk.path}/file: your quota on this disk is used up")
    assert list(disk.path.iterdir()) == []


def test_no_permission(small_disk):
    disk = small_disk(64)
    disk.path.chmod(0o755)
    assert as_nobody(disk.path).startswith(f"{disk.path}/file: no permission")


def test_a_line_that_a_kill_cut_off_spoils_no_other(tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"a":')
    append_lines(path, ["{}"])
    assert path.read_text().splitlines() == ['{"a": 1}', '{"a":', "{}"]


def test_what_libraries_say_of_a_full_disk(small_disk):
    disk = small_disk(16)
    path = disk.path / "model.safetensors"
    with pytest.raises(OSError) as caught, writing(path):
        save_file({"a": torch.zeros(100_000)}, path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))


def test_what_is_left_alone(tmp_path):
    with pytest.raises(OSError) as caught, writing(tmp_path / "written"):
        (tmp_path / "read").read_text()
    assert caught.value.filename == str(tmp_path / "read")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "written"):
        _ = 1 / 0
    assert disk_fault(ConnectionResetError(errno.ECONNRESET, "reset", "x")) is None
    assert disk_fault(UserError("no disk")) is None


def test_a_folder_is_there_complete_or_not_at_all(tmp_path, small_disk):
    target = tmp_path / "above" / "out"
    with folder_whole(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
    assert (target / "a").read_text() == "a"
    disk = small_disk(16)

    def write():
        with folder_whole(disk.path / "out") as folder:
            (folder / "a").write_text("a")
            (folder / "b").write_bytes(b"b" * 100_000)

    with pytest.raises(OSError) as caught:
        write()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(disk.path / "out"))
    assert list(disk.path.iterdir()) == []  # its room is free again


def test_a_file_that_a_library_writes_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("before")
    with file_whole(path) as beside:
        beside.write_text("half")
        assert path.read_text() == "before"
        beside.write_text("whole")
    assert path.read_text() == "whole"

    def half() -> None:
        with file_whole(path) as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_text() == "whole"
    with pytest.raises(FileNotFoundError) as caught, file_whole(path):
        pass  # the library has written nothing
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]
