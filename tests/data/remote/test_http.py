"""Files from a real HTTP server that misbehaves."""

import dataclasses
import threading
from datetime import datetime, timedelta, timezone

import pytest

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.remote import fetch as fetching
from maskmatch_scale.data.remote.fetch import ask_size
from maskmatch_scale.data.remote.shard_cache import ShardCache
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.remote.common import SHORT_S, SIZE, files_in, known, wait_until

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
        assert server.gets() >= 2
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


@pytest.mark.parametrize("conditions", [True, False])
def test_a_file_that_changes_between_two_halves(folder, options, conditions):
    """Also where the server sends the rest of another file although it was given the ETag of the first."""
    with FaultyServer(folder, {"a.tar": Fault(times=1, cut_after=100_000)}, conditions=conditions) as server:
        done: list[bytes] = []
        fetch = threading.Thread(
            target=lambda: done.append(ShardCache(options).fetch(f"{server.url}/a.tar").read_bytes())
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fetching, "_backoff", lambda *_: 0.3)
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
    assert files_in(options.cache) == []


GIVEN_UP = {
    "500": (Fault(status=500), "HTTP 500 Internal Server Error; check the network"),
    "a cut": (Fault(cut_after=0), "cut"),
    "a stall": (Fault(stall_after=0), f"stalled: no byte in {SHORT_S} s"),
    "a trickle": (Fault(trickle_after=1000), "stalled: .* bytes in"),
    "wrong bytes": (Fault(wrong_bytes=True), "not those the index has the checksum of; if this happens again, upload"),
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


def test_an_etag_stands_in_for_a_checksum(folder, options):
    """A file with another one is another file: it is kept under another name, and refused if it is not the expected."""
    url = "{}/a.tar"
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        size, etag = ask_size(url.format(server.url), options)
        assert (size, server.gets()) == (SIZE, 1)
        first = cache.fetch(url.format(server.url), size, etag=etag)
        assert cache.are_here([(url.format(server.url), None, etag), (url.format(server.url), None, None)]) == [0]
        (folder / "a.tar").write_bytes((folder / "b.tar").read_bytes())
        assert cache.fetch(url.format(server.url), size, etag=etag) == first  # no run notices a change half-way
        first.unlink()
        with pytest.raises(BadSample, match=r"a\.tar: tried once and failed: its ETag is .* where the index says"):
            cache.fetch(url.format(server.url), size, etag=etag)
        changed = ask_size(url.format(server.url), options)
        assert cache.fetch(url.format(server.url), *changed[:1], etag=changed[1]) != first
        server.etags = False
        first.unlink(missing_ok=True)
        assert cache.fetch(url.format(server.url), size, etag=etag).stat().st_size == SIZE  # nothing to compare with


def test_a_size_that_is_asked_for(folder, options):
    faults = {"a.tar": Fault(times=2, status=503), "b.tar": Fault(status=403), "c.tar": Fault(status=404)}
    with FaultyServer(folder, faults, etags=False) as server:
        assert ask_size(f"{server.url}/a.tar", options) == (SIZE, None)
        assert ask_size(f"{server.url}/b.tar", options) == (None, None)  # as for an address that is signed for GET
        with pytest.raises(BadSample, match=r"c\.tar: tried once and failed: HTTP 404"):
            ask_size(f"{server.url}/c.tar", options)
        assert not [request for request in server.requests if request.sent]
    assert ask_size("s3://bucket/a.tar", options) == (None, None)
