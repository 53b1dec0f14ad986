"""The cache's folder, by tables of mounts as clusters have them."""

import os
import shutil
from pathlib import Path

import pytest

from maskmatch_scale.data.remote import cache_place
from maskmatch_scale.data.remote.cache_folder import CacheFolder
from maskmatch_scale.data.remote.cache_place import Candidate, choose, default_cache, file_system, parse_mounts
from tests.data.remote.common import in_processes

NETWORK = ["nfs", "nfs4", "lustre", "gpfs", "ceph", "fuse.ceph-fuse", "beegfs", "fuse.sshfs", "cifs", "fuse", "autofs"]
LOCAL = ["ext4", "xfs", "btrfs", "overlay", "zfs", "fuseblk", "fuse.fuse-overlayfs", ""]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders by name, which the environment names; nothing of the user's is there."""
    folders = {name: tmp_path / name for name in ("home", "xdg", "slurm", "scratch", "tmpdir")}
    for folder in folders.values():
        folder.mkdir()
    for name in ("XDG_CACHE_HOME", "SLURM_TMPDIR", "LOCAL_SCRATCH", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folders["home"]))
    cache_place._chosen.cache_clear()
    yield folders
    cache_place._chosen.cache_clear()


def mounted(monkeypatch, tmp_path, table):
    lines = "".join(f"server {path} {kind} rw 0 0\n" for path, kind in table.items())
    (tmp_path / "mounts").write_text(lines)
    monkeypatch.setattr(cache_place, "_MOUNTS", tmp_path / "mounts")
    cache_place._chosen.cache_clear()


@pytest.mark.parametrize("kind", LOCAL)
def test_a_home_on_a_local_disk_has_it(places, monkeypatch, tmp_path, kind):
    mounted(monkeypatch, tmp_path, {"/": "overlay", places["home"]: kind or "newfs"})
    monkeypatch.setenv("TMPDIR", str(places["tmpdir"]))
    assert default_cache() == places["home"] / ".cache/maskmatch_scale/shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(places["xdg"]))
    assert default_cache() == places["xdg"] / "maskmatch_scale/shards"


@pytest.mark.parametrize("kind", NETWORK)
def test_a_home_on_a_network_never_has_it(places, monkeypatch, tmp_path, kind):
    mounted(monkeypatch, tmp_path, {"/": "ext4", places["home"]: kind, places["xdg"]: kind})
    monkeypatch.setenv("XDG_CACHE_HOME", str(places["xdg"]))
    user = f"maskmatch_scale-{os.getuid()}/shards"
    assert str(default_cache()) == f"/tmp/{user}"
    for variable, name in (("TMPDIR", "tmpdir"), ("LOCAL_SCRATCH", "scratch"), ("SLURM_TMPDIR", "slurm")):
        monkeypatch.setenv(variable, str(places[name]))
        assert default_cache() == places[name] / user
    shutil.rmtree(places["slurm"])  # of a job that has ended
    (tmp_path / "slurm").write_text("a file")
    cache_place._chosen.cache_clear()
    assert default_cache() == places["scratch"] / user


def test_a_link_to_a_network_disk(places, monkeypatch, tmp_path):
    mounted(monkeypatch, tmp_path, {"/": "ext4", places["scratch"]: "lustre"})
    (places["home"] / ".cache").symlink_to(places["scratch"])
    monkeypatch.setenv("TMPDIR", str(places["tmpdir"]))
    assert default_cache().is_relative_to(places["tmpdir"])


def test_memory_only_if_there_is_no_disk(places, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(places["tmpdir"]))
    table = {"/": "nfs", "/tmp": "nfs", places["home"]: "nfs", places["tmpdir"]: "tmpfs"}
    mounted(monkeypatch, tmp_path, table)
    assert default_cache().is_relative_to(places["tmpdir"])
    monkeypatch.setenv("LOCAL_SCRATCH", str(places["scratch"]))
    mounted(monkeypatch, tmp_path, {**table, places["tmpdir"]: "tmpfs", places["scratch"]: "xfs"})
    assert default_cache().is_relative_to(places["scratch"])
    mounted(monkeypatch, tmp_path, {"/": "nfs", places["home"]: "nfs"})
    monkeypatch.setenv("HOME", "/nowhere/home")
    assert default_cache().is_relative_to("/tmp")


def test_a_folder_that_another_user_has_made_is_not_used(tmp_path):
    theirs, other = tmp_path / "theirs", tmp_path / "other"
    theirs.symlink_to(tmp_path)
    candidates = (Candidate(theirs / "shards", True), Candidate(other / "shards", True))
    assert choose(candidates, {}).path == other / "shards"
    theirs.unlink()
    theirs.symlink_to(tmp_path / "not there yet")
    assert choose(candidates, {}).path == other / "shards"
    if os.getuid() == 0:
        theirs.unlink()
        theirs.mkdir()
        os.chown(theirs, 12345, 12345)
        assert choose(candidates, {}).path == other / "shards"
    own = (Candidate(theirs / "shards", False), Candidate(other / "shards", True))
    assert choose(own, {}).path == theirs / "shards"


def test_nobody_else_reads_what_lies_in_a_shared_folder(places, monkeypatch, tmp_path):
    mounted(monkeypatch, tmp_path, {"/": "ext4", places["home"]: "nfs"})
    monkeypatch.setenv("TMPDIR", str(places["tmpdir"]))
    before = os.umask(0o002)  # as groups have that share files
    try:
        CacheFolder(default_cache(), 100)
    finally:
        os.umask(before)
    (own,) = places["tmpdir"].iterdir()
    assert own.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_another_user_that_cannot_be_looked_into(tmp_path):
    """As the home directory that a container leaves to a user who is not root."""
    locked, free = tmp_path / "locked", Path("/tmp/maskmatch_scale-nobody/shards")
    locked.mkdir(mode=0)
    candidates = (*(Candidate(locked / "a/shards", is_shared) for is_shared in (False, True)), Candidate(free, True))

    def work(_number):
        if os.getuid() == 0:
            os.setuid(65534)
        assert choose(candidates, {}).path == free

    try:
        assert in_processes(1, work) == [0]
    finally:
        locked.chmod(0o700)


def test_without_a_table_of_mounts(places, monkeypatch, tmp_path):
    monkeypatch.setattr(cache_place, "_MOUNTS", tmp_path / "none")
    assert default_cache().is_relative_to(places["home"])


def test_tables_of_mounts():
    table = "/dev/sda / ext4 rw 0 0\nserver:/x /home/a\\040b nfs4 rw 0 0\nauto /h autofs rw 0 0\ns /h xfs rw 0 0\n?\n"
    assert parse_mounts(table) == {"/": "ext4", "/home/a b": "nfs4", "/h": "xfs"}


def test_the_nearest_mount_counts(tmp_path):
    mounts = {"/": "ext4", str(tmp_path): "nfs", str(tmp_path / "a"): "xfs"}
    assert file_system(tmp_path / "a/b/c", mounts) == "xfs"
    assert file_system(tmp_path / "ab", mounts) == "nfs"
    assert file_system(tmp_path.parent, mounts) == "ext4"
    assert file_system(tmp_path, {}) == ""


def test_what_is_mapped_lies_on_this_machine(places, monkeypatch, tmp_path):
    far, near = places["scratch"] / "shards", places["tmpdir"] / "shards"
    mounted(monkeypatch, tmp_path, {"/": "ext4", places["scratch"]: "nfs4"})
    assert cache_place.on_this_machine(far) == places["home"] / ".cache/maskmatch_scale/shards"
    assert cache_place.on_this_machine(near) == near
