"""Few descriptors, many sources, a full cache, and file systems with large blocks."""

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards import open_files
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.recipe import DataRecipe
from tests.data.bad_shards import tar_bytes
from tests.data.faulty_server import FaultyServer
from tests.data.remote.common import FORK


def write_folder(root: Path, shards: int, image_bytes: int = 100) -> Path:
    """A folder whose stream `s` has so many shards, each of one sample that is told by its bytes."""
    root.mkdir()
    entries = []
    for number in range(shards):
        data = tar_bytes([(f"{number}.jpg", random.Random(number).randbytes(image_bytes))])
        (root / f"{number}.tar").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"file": f"{number}.tar", "samples": 1, "bytes": len(data), "sha256": digest})
    streams = {"s": {"labelled": False, "shards": entries}}
    (root / "index.json").write_text(json.dumps({"source": "test", "streams": streams}))
    return root


def in_a_process(work) -> None:
    """Run a function in a forked process; its limits and files are its own."""
    process = FORK.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_ten_sources_and_1024_descriptors(tmp_path):
    write_folder(tmp_path / "x", 140)
    roots = [tmp_path / "x"] + [shutil.copytree(tmp_path / "x", tmp_path / str(number)) for number in range(9)]

    def work():
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        streams = [ShardStream(root, "s", strict=False) for root in roots]
        for number in range(140):
            for stream in streams:
                assert stream[number].key == str(number)

    in_a_process(work)


@pytest.mark.parametrize("spare", [0, 3])
def test_descriptors_that_others_took_are_waited_for_or_named(tmp_path, spare):
    """Where other code has nearly all of them, shards are closed to open others; without any, the limit is named."""
    root = write_folder(tmp_path / "x", 20)

    def work():
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        open_files._kept.clear()
        stream = ShardStream(root, "s", strict=False)
        with ExitStack() as taken:
            kept = [os.dup(0) for _ in range(spare)]
            while True:
                try:
                    taken.callback(os.close, os.dup(0))
                except OSError:
                    break
            for descriptor in kept:
                os.close(descriptor)
            if spare:
                assert [stream[number].key for number in range(20)] == [str(number) for number in range(20)]
            else:
                with pytest.raises(DataError, match="ulimit -n"):
                    stream[0]

    in_a_process(work)


def bytes_on_disk(cache: Path) -> int:
    """What the files of a cache take: those in the folder, and those that this process has open but are deleted."""
    there = sum(path.stat().st_size for path in cache.iterdir())
    for link in Path("/proc/self/fd").iterdir():
        try:
            status, target = link.stat(), str(link.readlink())
        except FileNotFoundError:
            continue
        if target.startswith(str(cache)) and status.st_nlink == 0:
            there += status.st_size
    return there


def test_the_bound_of_the_cache_holds_for_the_disk(tmp_path):
    """Shards that were dropped from the cache take no room: nobody keeps them open."""
    root = write_folder(tmp_path / "x", 30, image_bytes=20_000)
    bound = 3 * (root / "0.tar").stat().st_size
    with FaultyServer(root) as server:
        data = DataRecipe(root=server.url, cache_dir=str(tmp_path / "cache"), cache_gb=bound / 1e9)
        streams = [ShardStream(server.url, "s", data) for _ in range(2)]
        for number in range(30):
            for stream in streams:
                assert stream[number].image == ShardStream(root, "s")[number].image
                assert bytes_on_disk(tmp_path / "cache") <= bound


READING = """
import sys
from pathlib import Path
from maskmatch_scale.data.shards.reading import ShardStream

def read_bytes():
    return int(Path("/proc/self/io").read_text().split()[1])

assert Path(sys.argv[1], "0.tar").stat().st_blksize > 1 << 20
stream = ShardStream(sys.argv[1], "s")
before = read_bytes()
size = sum(len(stream[number].image) for number in range(len(stream)))
print((read_bytes() - before) / size)
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting a file system needs root")
def test_no_more_is_read_than_a_sample_has_where_blocks_are_large(tmp_path):
    """A tmpfs of huge pages has blocks of 2 MiB, as network file systems have. A buffer would read a whole one."""
    root, place = write_folder(tmp_path / "x", 30, image_bytes=100_000), tmp_path / "large"
    place.mkdir()
    mount = f"mount -t tmpfs -o size=200m,huge=always none {place} && cp -r {root} {place}/x"
    (tmp_path / "reading.py").write_text(READING)
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {sys.executable} {tmp_path}/reading.py {place}/x"],
        capture_output=True,
        text=True,
    )
    if "mount" in ran.stderr and ran.returncode == 32:
        pytest.skip("this kernel mounts no tmpfs of huge pages here")
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 1.2
