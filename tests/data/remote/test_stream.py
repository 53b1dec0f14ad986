"""A file read while it comes: each byte once, in whatever way the server fails."""

import dataclasses
import threading
import time

import pytest

from maskmatch_scale.data.faults import BadSample, DataError, NotFetched
from maskmatch_scale.data.remote import stream
from maskmatch_scale.data.remote.stream import open_stream
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.remote.common import SHORT_S, SIZE, wait_until


def whole(location, options, **how):
    opened = open_stream(location, options, **how)
    blocks = []
    while block := opened.read(70_000):
        assert len(block) <= 70_000
        blocks.append(block)
    opened.close()
    return b"".join(blocks)


def all_sent(server):
    """Bytes that a server has sent, when it has noted that the whole file was: that is after they have come."""
    wait_until(lambda: sum(request.sent for request in server.requests) >= SIZE)
    return sum(request.sent for request in server.requests)


FAULTS = {
    "none": [],
    "errors": [Fault(times=2, status=503)],
    "cuts": [Fault(times=2, cut_after=90_000)],
    "reset": [Fault(times=1, cut_after=10_000, reset=True)],
    "stall": [Fault(times=1, stall_after=50_000)],
    "chunks": [Fault(chunked=True)],
    "no length": [Fault(no_length=True)],
}


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_bytes_of_the_file(folder, options, fault, ranges):
    options = dataclasses.replace(options, timeout_s=SHORT_S if fault == "stall" else 10)
    with FaultyServer(folder, {"a.tar": FAULTS[fault]}, ranges=ranges) as server:
        assert whole(f"{server.url}/a.tar", options) == (folder / "a.tar").read_bytes()
        sent = all_sent(server)
    if ranges:
        assert sent == SIZE
    assert not options.cache.exists()


def test_local_files_pipes_and_other_schemes(folder, options):
    data = (folder / "a.tar").read_bytes()
    allowed = dataclasses.replace(options, allow_pipe=True)
    assert whole(str(folder / "a.tar"), options) == data
    assert whole(f"file://{folder}/a.tar", options) == data
    assert whole(f"pipe:cat {folder}/a.tar", allowed) == data
    once = folder / "once"
    assert whole(f"pipe:test -e {once} || {{ touch {once}; head -c 1000 {folder}/a.tar; exit 3; }}; cat {folder}/a.tar",
                 allowed) == data  # fmt: skip
    with pytest.raises(DataError, match=r"data\.allow_pipe=true"):
        open_stream(f"pipe:cat {folder}/a.tar", options)
    with pytest.raises(BadSample, match=r"none\.tar: no such file"):
        open_stream(str(folder / "none.tar"), options)


def test_what_was_read_comes_before_what_went_wrong(folder, options):
    with FaultyServer(folder, {"a.tar": [Fault(times=1, cut_after=50_000), Fault(status=404)]}) as server:
        opened = open_stream(f"{server.url}/a.tar", options)
        data = b""
        with pytest.raises(NotFetched, match=r"a\.tar: tried 2 times and failed: HTTP 404") as caught:  # noqa: PT012
            while True:
                data += opened.read(1000)
        assert data == (folder / "a.tar").read_bytes()[:50_000]
        assert not caught.value.may_pass


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changes_while_it_is_read(folder, options, ranges):
    with FaultyServer(folder, {"a.tar": [Fault(times=1, stall_after=50_000)]}, ranges=ranges) as server:
        opened = open_stream(f"{server.url}/a.tar", dataclasses.replace(options, timeout_s=SHORT_S))
        opened.read(10)
        (folder / "a.tar").write_bytes((folder / "b.tar").read_bytes())
        with pytest.raises(NotFetched, match=r"a\.tar: it was changed while it was read"):  # noqa: PT012
            while opened.read(100_000):
                pass


def test_a_slow_reader_is_no_stall_and_does_not_use_up_the_tries(folder, options, monkeypatch):
    """The server closes the connection again and again; each time more of the file has come."""
    monkeypatch.setattr(stream, "_AHEAD_BYTES", 1000)
    monkeypatch.setattr("maskmatch_scale.data.remote.fetch.LEAST_BYTES", 1000)
    options = dataclasses.replace(options, timeout_s=SHORT_S, attempts=2)
    with FaultyServer(folder, {"a.tar": [Fault(times=9, cut_after=25_000)]}) as server:
        opened = open_stream(f"{server.url}/a.tar", options)
        data = bytes(opened.read(10))
        time.sleep(2 * SHORT_S)
        while block := opened.read(1 << 20):
            data += block
        assert data == (folder / "a.tar").read_bytes()
        assert opened.failed_tries == 9
        assert all_sent(server) == SIZE


def test_it_stays_a_few_bytes_ahead_and_ends_when_it_is_closed(folder, options, monkeypatch):
    monkeypatch.setattr(stream, "_AHEAD_BYTES", 10_000)
    (folder / "large.tar").write_bytes(bytes(50_000_000))
    threads = threading.active_count()
    with FaultyServer(folder) as server:
        opened = open_stream(f"{server.url}/large.tar", options)
        opened.read(1)
        time.sleep(0.2)
        assert opened.received < 3_000_000  # one block of the network beyond the bound
        opened.close()
        wait_until(lambda: threading.active_count() <= threads + 2)  # those of the server


def test_patience(folder, options):
    with FaultyServer(folder, {"a.tar": Fault(status=503)}) as server:
        many = dataclasses.replace(options, attempts=1000)
        with pytest.raises(NotFetched, match="HTTP 503"):
            whole(f"{server.url}/a.tar", many, patience_s=0.3)
        asked = server.gets()
        with pytest.raises(NotFetched, match="not fetched while no other shard can be"):
            open_stream(f"{server.url}/a.tar", many, patience_s=0)
        assert server.gets() == asked
