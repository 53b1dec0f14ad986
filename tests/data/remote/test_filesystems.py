"""Files by fsspec, from memory and from disk."""

import dataclasses
import hashlib
import random
import time
from collections.abc import Callable

import pytest

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote.fetch import read_bytes
from maskmatch_scale.data.remote.shard_cache import ShardCache
from tests.data.remote.common import SHORT_S, known


def test_fsspec_in_memory(options):
    import fsspec

    data = random.Random(0).randbytes(9_000_000)  # several blocks
    fsspec.filesystem("memory").pipe("/bucket/x.tar", data)
    cache = ShardCache(options)
    assert cache.fetch("memory://bucket/x.tar", len(data), hashlib.sha256(data).hexdigest()).read_bytes() == data
    assert read_bytes("memory://bucket/x.tar", options) == data
    with pytest.raises(BadSample, match=r"memory://bucket/y\.tar: tried once and failed: FileNotFoundError"):
        cache.fetch("memory://bucket/y.tar")
    with pytest.raises(BadSample, match=r"tried 3 times .* bytes where 5 are expected"):
        cache.fetch("memory://bucket/x.tar", 5)


def test_fsspec_faults(options, monkeypatch):
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    data = random.Random(0).randbytes(9_000_000)
    MemoryFileSystem().pipe("/bucket/faulty.tar", data)
    faults: list[Callable[[], None]] = [lambda: time.sleep(1), lambda: None, _raise_broken]
    places = []
    read = MemoryFile.read

    def faulty(self, size=-1):
        places.append(self.tell())
        if faults:
            faults.pop(0)()
        return read(self, size)

    monkeypatch.setattr(MemoryFile, "read", faulty)
    options = dataclasses.replace(options, timeout_s=SHORT_S)
    path = ShardCache(options).fetch("memory://bucket/faulty.tar", sha256=hashlib.sha256(data).hexdigest())
    assert path.read_bytes() == data
    assert places[:4] == [0, 0, 4 << 20, 4 << 20]  # stalled, again from the start; broken, on from there


def _raise_broken() -> None:
    raise OSError("broken https://me:word@h/x?key=hush")


def test_fsspec_failures_hold_no_secrets(options, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "size", lambda *_: _raise_broken())
    MemoryFileSystem().pipe("/bucket/z.tar", b"z")
    with pytest.raises(BadSample, match="tried 3 times and failed: OSError: broken https://h/x;"):
        ShardCache(options).fetch("memory://bucket/z.tar")


def test_file_addresses_are_copied(folder, options):
    path = ShardCache(options).fetch((folder / "a.tar").as_uri(), **known(folder / "a.tar"))
    assert path.parent == options.cache
    assert path.read_bytes() == (folder / "a.tar").read_bytes()


def test_a_scheme_whose_library_is_missing(options, monkeypatch):
    import fsspec

    def missing(url):
        raise ImportError("Install the library\nto access it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"hdfs:// needs a library .*; Install the library to access it$") as caught:
        ShardCache(options).fetch("hdfs://host/x.tar")
    assert not isinstance(caught.value, BadSample)


def test_an_unknown_scheme(options):
    with pytest.raises(BadSample, match="tried once and failed: no such kind of address"):
        ShardCache(options).fetch("s4://bucket/x.tar")
