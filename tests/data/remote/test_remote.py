"""Shards that live elsewhere, against a real HTTP server that misbehaves, and processes that are killed."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote import cache_folder as cache_module
from maskmatch_scale.data.remote import fetch as transfer
from maskmatch_scale.data.remote.address import expand, is_remote, join, shown
from maskmatch_scale.data.remote.fetch import Remote
from maskmatch_scale.data.remote.shard_cache import ShardCache, read_bytes
from tests.data.faulty_server import Fault, FaultyServer

SIZE = 300_000  # more than what a transfer must move within the time-out
SHORT_S = 0.3
"""A time-out where one is waited for; elsewhere it is long, for a busy machine."""
backoff = transfer._backoff
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(transfer, "_backoff", lambda attempt, timeout_s: backoff(attempt, timeout_s) / 20)


@pytest.fixture
def folder(tmp_path):
    """Files a.tar … h.tar of SIZE bytes each."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number, name in enumerate("abcdefgh"):
        (folder / f"{name}.tar").write_bytes(random.Random(number).randbytes(SIZE))
    return folder


@pytest.fixture
def options(tmp_path):
    return Remote(tmp_path / "cache", limit_bytes=100 * SIZE, timeout_s=10, attempts=3)


def known(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def files_in(cache: Path) -> list[str]:
    notes = (".turn.lock", ".room.lock")
    names = (path.name for path in cache.iterdir())
    return sorted(name for name in names if name not in notes and not name.endswith(".failed"))


def in_processes(count: int, work: Callable[[int], None]) -> list[int | None]:
    """Exit codes."""
    processes = [FORK.Process(target=work, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Addresses


def test_what_is_remote(tmp_path):
    for location in ("http://h/x.tar", "s3://b/x", "gs://b", "memory://x", "file:///x", "pipe:cat x", "a+b::c://x"):
        assert is_remote(location)
    for location in ("x.tar", "/data/x.tar", "data:x", "pipes/x", tmp_path, Path("http://h/x")):
        assert not is_remote(location)


@pytest.mark.parametrize(
    ("root", "file", "joined"),
    [
        ("data", "x.tar", "data/x.tar"),
        ("data/index.json", "sub/x.tar", "data/sub/x.tar"),
        ("data", "/other/x.tar", "/other/x.tar"),
        ("data", "https://h/x.tar", "https://h/x.tar"),
        ("https://h/d/", "x.tar", "https://h/d/x.tar"),
        ("https://h/d/index.json?sig=1", "x.tar", "https://h/d/x.tar?sig=1"),
        ("https://h/d?sig=1/2", "a b#1.tar", "https://h/d/a%20b%231.tar?sig=1/2"),
        ("https://h", "x.tar", "https://h/x.tar"),
        ("https://h/d", "/local/x.tar", "/local/x.tar"),
        ("https://h/d", "pipe:cat x", "pipe:cat x"),
        ("s3://bucket/d", "a b#1.tar", "s3://bucket/d/a b#1.tar"),
        ("s3://bucket/d/e", "../x.tar", "s3://bucket/d/x.tar"),
        ("s3://bucket", "./x.tar", "s3://bucket/x.tar"),
        ("file:///data/d", "../../../x.tar", "file:///x.tar"),
    ],
)
def test_join(root, file, joined):
    assert join(root, file) == joined


def test_a_pipe_is_no_folder():
    with pytest.raises(DataError, match="a pipe is one file"):
        join("pipe:cat x", "y.tar")


def test_expand(folder):
    assert expand("https://h/x-{008..010}.tar") == [f"https://h/x-{number}.tar" for number in ("008", "009", "010")]
    assert expand("s3://b/{a,b}-{0..1}.tar") == [f"s3://b/{name}.tar" for name in ("a-0", "a-1", "b-0", "b-1")]
    assert expand(f"{folder}/{{c,a}}.tar") == [f"{folder}/c.tar", f"{folder}/a.tar"]
    assert expand(f"{folder}/[a-c].*") == [f"{folder}/{name}.tar" for name in "abc"]
    assert expand("https://h/x.tar?a=*") == ["https://h/x.tar?a=*"]
    assert expand("pipe:cat *.tar") == ["pipe:cat *.tar"]
    (folder / "odd[1].tar").touch()
    assert expand(f"{folder}/odd[1].tar") == [f"{folder}/odd[1].tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/{{a..z}}.tar", "i.tar: no such file"),
        ("{folder}/*.zip", "no such file"),
        ("{folder}/{{a", "no such file|braces do not match"),
        ("s3://b/*.tar", "for local folders only"),
        ("https://h/{{0..99999999}}", "more than"),
    ],
)
def test_patterns_that_match_nothing(folder, pattern, message):
    with pytest.raises(DataError, match=message):
        expand(pattern.format(folder=folder))


def test_what_is_shown_holds_no_secrets():
    assert shown("https://user:pass@h:1/d/x.tar?X-Amz-Signature=1#f") == "https://h:1/d/x.tar"
    assert shown("s3://key:secret@bucket/x.tar") == "s3://bucket/x.tar"
    command = "pipe:TOKEN=abc/x.tar /usr/bin/curl -H 'Authorization: Bearer xyz' 'https://u:p@h/x-01.tar?sig=1' | cat"
    assert shown(command) == "pipe:curl … https://h/x-01.tar"
    assert shown("data/odd?.tar") == "data/odd?.tar"


# What a server does


def test_a_file_is_fetched_once(folder, options):
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        for _ in range(3):
            path = cache.fetch(f"{server.url}/a.tar", **known(folder / "a.tar"))
            assert path.read_bytes() == (folder / "a.tar").read_bytes()
        assert server.gets() == 1
    assert (cache.figures.hits, cache.figures.files, cache.figures.bytes_downloaded) == (2, 1, SIZE)
    assert cache.figures.retries == cache.figures.failures == 0
    assert cache.figures.seconds > 0
    assert files_in(options.cache) == [path.name]


def test_a_file_of_which_nothing_is_known(folder, options):
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        with cache.open(f"{server.url}/a.tar") as first, cache.open(f"{server.url}/a.tar") as second:
            assert first.read() == second.read() == (folder / "a.tar").read_bytes()
        assert server.gets() == 1


SURVIVED = {
    "500 twice": [Fault(times=2, status=500)],
    "503 with a date": [
        Fault(
            times=1,
            status=503,
            headers={"Retry-After": f"{datetime.now(timezone.utc) - timedelta(hours=1):%a, %d %b %Y %H:%M:%S GMT}"},
        )
    ],
    "408 then 429": [Fault(times=1, status=408), Fault(times=1, status=429, headers={"Retry-After": "0"})],
    "no head": [Fault(times=1, delay_s=1)],
    "a stall before the first byte": [Fault(times=1, stall_after=0)],
    "a stall": [Fault(times=1, stall_after=100_000)],
    "a trickle": [Fault(times=1, trickle_after=100_000)],
    "a cut": [Fault(times=1, cut_after=100_000)],
    "two cuts": [Fault(times=2, cut_after=100_000)],
    "a reset": [Fault(times=1, cut_after=100_000, reset=True)],
    "a cut of chunks": [Fault(times=1, cut_after=100_000, chunked=True)],
    "a cut without a length": [Fault(times=1, cut_after=100_000, no_length=True)],
    "wrong bytes": [Fault(times=2, wrong_bytes=True)],
    "wrong bytes and a cut": [Fault(times=1, wrong_bytes=True, cut_after=100_000)],
    "a length too short": [Fault(times=1, length_off_by=-1000)],
    "a length too long": [Fault(times=1, length_off_by=1000)],
    "another range": [
        Fault(times=1, cut_after=100_000),
        Fault(times=1, headers={"Content-Range": f"bytes 0-{SIZE - 1}/{SIZE}"}),
    ],
}


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("fault", SURVIVED)
def test_faults_that_pass(folder, options, fault, ranges):
    waits = any(word in fault for word in ("stall", "trickle", "no head", "too long"))
    options = dataclasses.replace(options, timeout_s=SHORT_S if waits else 10, attempts=6)
    with FaultyServer(folder, {"a.tar": SURVIVED[fault]}, ranges=ranges) as server:
        cache = ShardCache(options)
        path = cache.fetch(f"{server.url}/a.tar", **known(folder / "a.tar"))
        assert path.read_bytes() == (folder / "a.tar").read_bytes()
        assert cache.figures.retries >= 1
    assert files_in(options.cache) == [path.name]


@pytest.mark.parametrize("ways", [{"chunked": True}, {"no_length": True}])
def test_lengths_that_are_not_told(folder, options, ways):
    with FaultyServer(folder, {"a.tar": Fault(**ways)}) as server:
        path = ShardCache(options).fetch(f"{server.url}/a.tar")
        assert path.read_bytes() == (folder / "a.tar").read_bytes()


def test_a_cut_goes_on_where_it_was(folder, options):
    with FaultyServer(folder, {"*": Fault(times=1, cut_after=100_000)}) as server:
        ShardCache(options).fetch(f"{server.url}/a.tar", **known(folder / "a.tar"))
        assert [(r.range, r.sent) for r in server.requests] == [(None, 100_000), ("bytes=100000-", SIZE - 100_000)]
        # With the ETag alone as well; with neither it would not be known whether both halves are of one file.
        ShardCache(options).fetch(f"{server.url}/b.tar")
        assert server.requests[-1].headers["If-Range"].startswith('"')
        assert server.requests[-1].sent == SIZE - 100_000
        server.etags = False
        ShardCache(options).fetch(f"{server.url}/c.tar")
        assert server.requests[-1].range is None


def test_a_file_that_changes_between_two_halves(folder, options):
    with FaultyServer(folder, {"a.tar": Fault(times=1, cut_after=100_000)}) as server:
        done: list[bytes] = []
        fetch = threading.Thread(
            target=lambda: done.append(ShardCache(options).fetch(f"{server.url}/a.tar").read_bytes())
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transfer, "_backoff", lambda *_: 0.3)
            fetch.start()
            wait_until(lambda: server.gets() == 1 and server.open_requests == 0)
            (folder / "a.tar").write_bytes((folder / "b.tar").read_bytes())
            fetch.join()
        assert done == [(folder / "b.tar").read_bytes()]


def test_a_server_that_changes_its_mind_about_the_length(folder, options):
    with FaultyServer(folder, {"a.tar": Fault(times=1, length_off_by=1000)}) as server:
        path = ShardCache(options).fetch(f"{server.url}/a.tar", sha256=known(folder / "a.tar")["sha256"])
        assert path.stat().st_size == SIZE


@pytest.mark.parametrize("status", [401, 403, 404, 410, 400, 304])
def test_answers_that_will_not_change(folder, options, status):
    with FaultyServer(folder, {"a.tar": Fault(status=status)}) as server:
        cache = ShardCache(options)
        with pytest.raises(BadSample, match=rf"a\.tar: tried once and failed: HTTP {status}") as caught:
            cache.fetch(f"{server.url}/a.tar")
        assert server.gets() == 1
    assert caught.value.reason == "shard_unreadable"
    assert cache.figures.failures == 1
    assert files_in(options.cache) == []


GIVEN_UP = {
    "500": (Fault(status=500), "HTTP 500 Internal Server Error; check the network"),
    "a cut": (Fault(cut_after=0), "cut"),
    "a stall": (Fault(stall_after=0), f"stalled: no byte in {SHORT_S} s"),
    "a trickle": (Fault(trickle_after=1000), "stalled: .* bytes in"),
    "wrong bytes": (Fault(wrong_bytes=True), "not those the index has the checksum of; if it is so again, upload"),
    "a wrong length": (Fault(length_off_by=1), f"{SIZE + 1} bytes where {SIZE} are expected"),
}


@pytest.mark.parametrize("fault", GIVEN_UP)
def test_faults_that_do_not_pass(folder, options, fault):
    given, message = GIVEN_UP[fault]
    options = dataclasses.replace(options, timeout_s=SHORT_S if "stalled" in message else 10, attempts=2)
    with FaultyServer(folder, {"a.tar": given}) as server:
        url = server.url.replace("http://", "http://user:word@") + "/a.tar?X-Signature=hush"
        with pytest.raises(BadSample, match=rf"^{server.url}/a\.tar: tried 2 times and failed: .*{message}") as caught:
            ShardCache(options).fetch(url, **known(folder / "a.tar"))
        assert server.gets() == 2
    for secret in ("user", "word", "hush", "\n"):
        assert secret not in str(caught.value)
    assert files_in(options.cache) == []


def test_no_server_at_all(options):
    with FaultyServer(options.cache) as server:
        url = server.url
    with pytest.raises(BadSample, match=r"tried 3 times and failed: no connection \(.*refused\)"):
        ShardCache(options).fetch(f"{url}/a.tar?secret=1")
    with pytest.raises(BadSample, match="not a valid address"):
        ShardCache(options).fetch("http://[::1/a.tar")


def test_user_and_password_are_sent_and_not_passed_on(folder, options):
    with (
        FaultyServer(folder) as other,
        FaultyServer(folder, {"a.tar": Fault(status=302, headers={"Location": f"{other.url}/b.tar"})}) as server,
    ):
        path = ShardCache(options).fetch(server.url.replace("http://", "http://me:a%20b@") + "/a.tar")
        assert path.read_bytes() == (folder / "b.tar").read_bytes()
        assert server.requests[0].headers["Authorization"] == "Basic bWU6YSBi"
        assert other.requests[0].headers["Authorization"] is None


def test_redirects(folder, options):
    faults = {
        "a.tar": Fault(status=307, headers={"Location": "/b.tar", "Retry-After": "60"}),
        "round.tar": Fault(status=302, headers={"Location": "/round.tar"}),
        "b.tar": Fault(times=1, cut_after=100_000),
    }
    with FaultyServer(folder, faults) as server:
        path = ShardCache(options).fetch(f"{server.url}/a.tar", **known(folder / "b.tar"))
        assert path.read_bytes() == (folder / "b.tar").read_bytes()
        assert [request.path for request in server.requests] == ["a.tar", "b.tar", "a.tar", "b.tar"]
        with pytest.raises(BadSample, match="tried once and failed: more than 5 redirects"):
            ShardCache(options).fetch(f"{server.url}/round.tar")


def test_through_a_proxy(folder, options, monkeypatch):
    with FaultyServer(folder) as server:
        monkeypatch.setenv("http_proxy", server.url)
        path = ShardCache(options).fetch("http://shards.invalid/a.tar")
        assert path.read_bytes() == (folder / "a.tar").read_bytes()
    with pytest.raises(BadSample, match=r"the proxy: .*check http_proxy"):
        ShardCache(options).fetch("http://shards.invalid/b.tar")


def test_pauses(options, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", pauses.append)
    later = format(datetime.now(timezone.utc) + timedelta(days=1), "%a, %d %b %Y %H:%M:%S GMT")
    faults = [Fault(times=1, status=429, headers={"Retry-After": value}) for value in ("7", "9999", later, "soon")]
    with FaultyServer(options.cache, {"x": faults}) as server, pytest.raises(DataError, match="404"):
        read_bytes(f"{server.url}/x", dataclasses.replace(options, attempts=9))
    assert pauses[:3] == [7, 60, 60]
    assert pauses[3] <= 8  # an unreadable date: the fourth pause's own bound
    # Full jitter: from 0 up to a bound that doubles, and none of it from seeded state.
    for attempt, bound in ((1, 1), (2, 2), (4, 8), (20, 30)):
        random.seed(0)
        drawn = [backoff(attempt, 30) for _ in range(200)]
        random.seed(0)
        assert drawn != [backoff(attempt, 30) for _ in range(200)]
        assert 0 <= min(drawn) < bound / 4
        assert bound * 3 / 4 < max(drawn) <= bound
    assert all(backoff(1, 0.5) <= 0.05 for _ in range(200))  # no longer than a tenth of the time-out at first


def test_small_files_into_memory(folder, options):
    faults = {"a.tar": [Fault(times=1, cut_after=1000), Fault(times=1, status=500)], "b.tar": Fault(status=403)}
    with FaultyServer(folder, faults) as server:
        assert read_bytes(f"{server.url}/a.tar", options) == (folder / "a.tar").read_bytes()
        with pytest.raises(DataError, match="HTTP 403") as caught:
            read_bytes(f"{server.url}/b.tar", options)
    assert not isinstance(caught.value, BadSample)
    assert not options.cache.exists()


# Stores, and commands


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


def test_stores_whose_library_is_missing(options, monkeypatch):
    import fsspec

    def missing(url):
        raise ImportError("Install the library\nto access it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for url, advice in (
        ("s3://bucket/x.tar", r"pip install 'maskmatch_scale\[s3\]'$"),
        ("gs://bucket/x.tar", r"pip install 'maskmatch_scale\[gcs\]'$"),
        ("hdfs://host/x.tar", "Install the library to access it$"),
    ):
        with pytest.raises(DataError, match=advice) as caught:
            ShardCache(options).fetch(url)
        assert not isinstance(caught.value, BadSample)


def test_an_unknown_scheme(options):
    with pytest.raises(BadSample, match="tried once and failed: no such kind of address"):
        ShardCache(options).fetch("s4://bucket/x.tar")


def test_a_pipe_needs_leave(folder, options):
    url = f"pipe:cat {folder}/a.tar"
    for fetch in (ShardCache(options).fetch, lambda url: read_bytes(url, options)):
        with pytest.raises(DataError, match=r"runs a shell command.*data\.allow_pipe=true") as caught:
            fetch(url)
        assert not isinstance(caught.value, BadSample)


def test_pipes(folder, options):
    options = dataclasses.replace(options, allow_pipe=True)
    cache = ShardCache(options)
    a = folder / "a.tar"
    assert cache.fetch(f"pipe:cat {a} | cat", **known(a)).read_bytes() == a.read_bytes()
    assert read_bytes(f"pipe:cat {a}", options) == a.read_bytes()
    once = folder / "once"
    flaky = f"pipe:test -e {once} || {{ touch {once}; head -c 1000 {a}; exit 3; }}; cat {a}"
    assert cache.fetch(flaky).read_bytes() == a.read_bytes()
    for command, message in (
        (f"echo password no >&2; echo so $KEY >&2; exit 7; cat {a}", r"ended with code 7 \(so\); try it in a shell"),
        (f"head -c 1000 {a}; sleep 60", f"stalled: no byte in {SHORT_S} s"),
        (f"while :; do printf x; sleep 0.05; done; cat {a}", "stalled: .* bytes in"),
        (f"cat {a}; exec >&-; sleep 60", "the command does not end"),
        (f"head -c 1000 {a}", f"cut after 1000 of {SIZE} bytes"),
        (f"cat {a} {a}", f"more than the {SIZE} bytes"),
        (f"cat {folder}/b.tar", "checksum"),
    ):
        waits = "stalled" in message or "end" in message.split()
        failing = dataclasses.replace(options, timeout_s=SHORT_S if waits else 10, attempts=2, cache=folder / "cache")
        with pytest.raises(BadSample, match=rf"^pipe:.*tried 2 times and failed: .*{message}"):
            ShardCache(failing).fetch(f"pipe:{command}", **known(a))


# The cache


def test_a_cached_file_of_another_size_is_fetched_again(folder, options):
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        url, facts = f"{server.url}/a.tar", known(folder / "a.tar")
        cache.fetch(url, **facts).write_bytes(b"damaged")
        assert cache.fetch(url, **facts).read_bytes() == (folder / "a.tar").read_bytes()
        assert server.gets() == 2


def test_one_checksum_is_one_file_wherever_it_lies(folder, options):
    (folder / "copy.tar").write_bytes((folder / "a.tar").read_bytes())
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        first = cache.fetch(f"{server.url}/a.tar", **known(folder / "a.tar"))
        assert cache.fetch(f"{server.url}/copy.tar", **known(folder / "a.tar")) == first
        assert server.gets() == 1


def test_the_least_recently_used_goes(folder, options):
    cache = ShardCache(dataclasses.replace(options, limit_bytes=3 * SIZE))
    (options.cache / "somebody's.tar").write_bytes(bytes(10 * SIZE))
    with FaultyServer(folder) as server:

        def fetch(name):
            return cache.fetch(f"{server.url}/{name}.tar", **known(folder / f"{name}.tar"))

        for age, name in ((300, "a"), (200, "b"), (100, "c")):
            os.utime(fetch(name), (time.time() - age,) * 2)
        fetch("a")  # a use
        before = fetch("a").stat().st_mtime
        fetch("a")
        assert fetch("a").stat().st_mtime == before  # not noted again within a minute
        kept = {name: fetch(name) for name in "a"}
        opened = (options.cache / f"sha256-{known(folder / 'b.tar')['sha256']}").open("rb")
        fetch("d")
        assert server.gets() == 4
        assert kept["a"].exists()
        assert opened.read() == (folder / "b.tar").read_bytes()  # dropped, but still readable
        opened.close()
        fetch("b")
        assert server.gets() == 5
    assert (options.cache / "somebody's.tar").exists()
    assert sum((options.cache / name).stat().st_size for name in files_in(options.cache)) == 13 * SIZE


@pytest.mark.parametrize("facts", [{"size": SIZE}, {}], ids=["size known", "size told"])
def test_a_file_larger_than_the_cache(folder, options, facts):
    with FaultyServer(folder, {"c.tar": Fault(chunked=True)}) as server:
        cache = ShardCache(dataclasses.replace(options, limit_bytes=SIZE - 1))
        for name in "ac":
            with pytest.raises(DataError, match=r"raise data\.cache_gb") as caught:
                cache.fetch(f"{server.url}/{name}.tar", **facts)
            assert not isinstance(caught.value, BadSample)
    assert files_in(options.cache) == []


def test_a_full_disk(folder, options, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "scandir", full)
    with FaultyServer(folder) as server, pytest.raises(DataError, match=r"cache: the disk is full.*data\.cache_dir"):
        ShardCache(options).fetch(f"{server.url}/a.tar")


def test_a_disk_that_fills_up(folder, options):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    part_open = Path.open

    def full(self, mode="r", *args, **kwargs):
        file = part_open(self, mode, *args, **kwargs)
        if mode == "x+b":
            os.dup2(os.open("/dev/full", os.O_RDWR), file.fileno())
            file.truncate = lambda size: size  # a device has no length
        return file

    with FaultyServer(folder) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(DataError, match=r"the disk is full"):
            ShardCache(options).fetch(f"{server.url}/a.tar")
    assert files_in(options.cache) == []


def test_a_folder_that_cannot_be_made(tmp_path, options):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache: Not a directory.*data\.cache_dir"):
        ShardCache(dataclasses.replace(options, cache=tmp_path / "file" / "cache"))


def test_leftovers_of_the_killed_are_removed(folder, options):
    cache = ShardCache(options)
    leftover = options.cache / f".url-{'0' * 64}.{'0' * 16}.part"
    leftover.write_bytes(bytes(1000))
    with FaultyServer(folder) as server:
        path = cache.fetch(f"{server.url}/a.tar")
    assert files_in(options.cache) == [path.name]


# Several at once


def test_processes_fetch_a_file_once(folder, options):
    with FaultyServer(folder, {"*": Fault(delay_s=0.05)}) as server:
        facts = {name: known(folder / f"{name}.tar") for name in "abcd"}

        def work(number):
            cache = ShardCache(options)
            for name in random.Random(number).sample("abcd", 4):
                with cache.open(f"{server.url}/{name}.tar", **facts[name]) as file:
                    assert file.read() == (folder / f"{name}.tar").read_bytes()

        assert in_processes(6, work) == [0] * 6
        assert {name: server.gets(f"{name}.tar") for name in "abcd"} == dict.fromkeys("abcd", 1)
    assert len(files_in(options.cache)) == 4


@pytest.mark.parametrize("lengths", ["known", "told", "unknown"])
def test_the_bound_holds_and_nobody_fails(folder, options, lengths):
    """Six processes, eight files, room for two and a half."""
    options = dataclasses.replace(options, limit_bytes=5 * SIZE // 2)
    fault = Fault(chunked=True) if lengths == "unknown" else Fault()
    facts = {name: known(folder / f"{name}.tar") if lengths == "known" else {} for name in "abcdefgh"}

    def work(number):
        cache = ShardCache(options)
        for name in random.Random(number).sample("abcdefgh", 8):
            cache.prefetch(f"{server.url}/{name}.tar", **facts[name])
            with cache.open(f"{server.url}/{name}.tar", **facts[name]) as file:
                assert file.read() == (folder / f"{name}.tar").read_bytes()

    with FaultyServer(folder, {"*": fault}) as server:
        processes = [FORK.Process(target=work, args=(number,)) for number in range(6)]
        for process in processes:
            process.start()
        most = 0
        while any(process.is_alive() for process in processes):
            most = max(most, bytes_in(options.cache))
            time.sleep(0.002)
        assert [process.exitcode for process in processes] == [0] * 6
    assert SIZE < most <= options.limit_bytes


def bytes_in(cache: Path) -> int:
    """What all files take, counted while none is begun or dropped."""
    if not (cache / ".room.lock").exists():
        return 0
    with (cache / ".room.lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = {}
        for path in list(cache.iterdir()):
            with suppress(FileNotFoundError):
                status = path.stat()
                sizes[status.st_ino] = status.st_size  # once, if it is renamed meanwhile
        return sum(sizes.values())


def test_a_killed_process_blocks_nobody(folder, options):
    options = dataclasses.replace(options, limit_bytes=SIZE)
    facts = known(folder / "a.tar")
    with FaultyServer(folder, {"a.tar": Fault(times=1, stall_after=100_000)}) as server:

        def work():
            ShardCache(options).fetch(f"{server.url}/a.tar", **facts)

        victim, waiting = FORK.Process(target=work), FORK.Process(target=work)
        victim.start()
        server.wait_for("a.tar", 100_000)
        wait_until(lambda: any(name.endswith(".part") for name in files_in(options.cache)))
        waiting.start()
        os.kill(victim.pid, signal.SIGKILL)
        waiting.join()
        assert waiting.exitcode == 0
        victim.join()
        assert server.gets("a.tar") == 2
    assert files_in(options.cache) == [f"sha256-{facts['sha256']}"]


def test_a_child_does_not_keep_its_parents_locks(folder, options):
    """A worker that is forked while its parent fetches; the parent is killed, the worker lives on."""
    reader, writer = os.pipe()
    with FaultyServer(folder, {"a.tar": Fault(times=1, stall_after=100_000)}) as server:

        def parent():
            cache = ShardCache(options)
            cache.prefetch(f"{server.url}/a.tar")
            server_has_it(options.cache)
            if (child := os.fork()) == 0:
                signal.pause()
            os.write(writer, child.to_bytes(8, "little"))
            signal.pause()

        victim = FORK.Process(target=parent)
        victim.start()
        child = int.from_bytes(os.read(reader, 8), "little")
        try:
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            cache = ShardCache(options)
            assert cache.fetch(f"{server.url}/a.tar").read_bytes() == (folder / "a.tar").read_bytes()
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(reader)
            os.close(writer)
    assert len(files_in(options.cache)) == 1


def server_has_it(cache: Path) -> None:
    wait_until(lambda: any(name.endswith(".part") for name in files_in(cache)))


def test_without_locks(folder, options, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache_module.fcntl, "flock", none)
    cache = ShardCache(dataclasses.replace(options, limit_bytes=2 * SIZE))
    old, young = (options.cache / f".url-{digit * 64}.{'0' * 16}.part" for digit in "01")
    for part, age in ((old, 3600), (young, 1)):
        part.touch()
        os.utime(part, (time.time() - age,) * 2)
    with FaultyServer(folder) as server:

        def work(number):
            for name in "abc":
                with cache.open(f"{server.url}/{name}.tar", **known(folder / f"{name}.tar")) as file:
                    assert file.read() == (folder / f"{name}.tar").read_bytes()

        work(0)
        assert not old.exists()
        assert young.exists()
        assert in_processes(3, work) == [0] * 3


def test_prefetch(folder, options):
    with FaultyServer(folder, {"bad.tar": Fault(status=500), "*": Fault(delay_s=0.2)}) as server:
        cache = ShardCache(options)
        cache.prefetch(f"{server.url}/bad.tar")
        cache.prefetch("pipe:exit 1")
        cache.prefetch("nonsense")
        for _ in range(3):
            cache.prefetch(f"{server.url}/a.tar")
        # It is waited for, not fetched again.
        assert cache.fetch(f"{server.url}/a.tar").read_bytes() == (folder / "a.tar").read_bytes()
        assert server.gets("a.tar") == 1
        wait_until(lambda: not cache._here().prefetching)
        for name in "bcdefgh":
            cache.prefetch(f"{server.url}/{name}.tar")
        wait_until(lambda: not cache._here().prefetching)
        assert sum(server.gets(f"{name}.tar") for name in "bcdefgh") == 4  # the others were too many
        with pytest.raises(BadSample, match="HTTP 500"):
            cache.fetch(f"{server.url}/bad.tar")


def test_prefetch_leaves_a_file_to_the_process_that_fetches_it(folder, options):
    with FaultyServer(folder, {"a.tar": Fault(delay_s=0.3)}) as server:
        other = FORK.Process(target=lambda: ShardCache(options).fetch(f"{server.url}/a.tar"))
        other.start()
        server.wait_for("a.tar")
        cache = ShardCache(options)
        cache.prefetch(f"{server.url}/a.tar")
        wait_until(lambda: not cache._here().prefetching)
        assert other.is_alive()
        other.join()
        assert server.gets() == 1


def test_a_cache_may_be_forked_and_pickled(folder, options):
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        cache.prefetch(f"{server.url}/a.tar")
        cache.fetch(f"{server.url}/b.tar")

        def work(number):
            for copy in (cache, pickle.loads(pickle.dumps(cache))):
                copy.prefetch(f"{server.url}/{'cdef'[number]}.tar")
                copy.fetch(f"{server.url}/a.tar")
                copy.fetch(f"{server.url}/{'cdef'[number]}.tar")
                assert copy.figures.hits + copy.figures.files >= 2
                assert copy.figures.bytes_downloaded <= 2 * SIZE

        assert in_processes(4, work) == [0] * 4
        assert server.gets() == 6
    assert pickle.loads(pickle.dumps(options)) == options


def test_those_that_wait_for_a_file_do_not_try_it_again(folder, options):
    """All loader processes want a lost shard at about the same time: one of them goes through all tries."""
    with FaultyServer(folder, {"*": [Fault(status=500)]}) as server:
        context = multiprocessing.get_context("fork")
        results = context.Queue()

        def fetch():
            try:
                ShardCache(options).open(f"{server.url}/lost.tar", 5, "0" * 64)
            except BadSample as error:
                results.put((error.reason, str(error)))

        readers = [context.Process(target=fetch) for _ in range(4)]
        for reader in readers:
            reader.start()
        met = [results.get(timeout=60) for _ in readers]
    assert {reason for reason, _ in met} == {"shard_unreadable"}
    assert all("lost.tar" in message for _, message in met)
    # Who came too late to wait tries for itself.
    assert len(server.requests) <= 2 * options.attempts
