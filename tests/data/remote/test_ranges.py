"""Single ranges from real servers: the right bytes or an error, in a time that is bounded."""

import time

import pytest

from maskmatch_scale.data.remote.fetch import has_ranges, read_range
from maskmatch_scale.data.remote.http import head
from maskmatch_scale.data.remote.transfer import TransferError
from tests.data.faulty_server import Fault, FaultyProxy, FaultyServer
from tests.data.remote.common import SHORT_S, SIZE

START, STOP = 100_000, 150_000
FAULTS = {
    "500": Fault(status=500),
    "404": Fault(status=404),
    "no head": Fault(delay_s=1),
    "a stall before the first byte": Fault(stall_after=0),
    "a stall": Fault(stall_after=10_000),
    "a trickle": Fault(trickle_after=10_000),
    "a cut": Fault(cut_after=10_000),
    "a reset": Fault(cut_after=10_000, reset=True),
    "a cut without a length": Fault(cut_after=10_000, no_length=True),
    "a length too short": Fault(length_off_by=-1000),
    "another range": Fault(headers={"Content-Range": f"bytes 0-49999/{SIZE}"}),
    "no range is said": Fault(headers={"Content-Range": "?"}),
    "another size": Fault(headers={"Content-Range": f"bytes {START}-{STOP - 1}/{SIZE + 1}"}),
    "a redirect to itself": Fault(status=302, headers={"Location": "/a.tar"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_errors_and_soon(folder, fault):
    waits = any(word in fault for word in ("stall", "trickle", "no head"))
    with FaultyServer(folder, {"a.tar": FAULTS[fault]}) as server:
        began = time.monotonic()
        with pytest.raises(TransferError):
            read_range(f"{server.url}/a.tar", START, STOP, SIZE, None, SHORT_S if waits else 10)
        assert time.monotonic() - began < 10  # the trickle would take 40 minutes
        # The connection is not one on which the rest of that answer is read.
        server.set_faults({})
        assert read_range(f"{server.url}/a.tar", 0, 10, SIZE, None, 10) == (folder / "a.tar").read_bytes()[:10]


@pytest.mark.parametrize("ways", [{}, {"chunked": True}, {"no_length": True}])
def test_the_bytes(folder, ways):
    with FaultyServer(folder, {"a.tar": Fault(**ways)}) as server:
        url = f"{server.url}/a.tar"
        data = (folder / "a.tar").read_bytes()
        _, etag = head(url, 10)
        for start, stop in ((0, 1), (START, STOP), (0, SIZE), (SIZE - 1, SIZE)):
            for known in (None, etag):
                assert read_range(url, start, stop, SIZE, known, 10) == data[start:stop]
        assert read_range(url, START, STOP, None, None, 10) == data[START:STOP]
        if not ways:
            assert server.connections == 1


@pytest.mark.parametrize("conditions", [True, False], ids=["If-Match", "no If-Match"])
def test_a_file_that_has_changed(folder, conditions):
    with FaultyServer(folder, conditions=conditions) as server:
        url = f"{server.url}/a.tar"
        _, etag = head(url, 10)
        (folder / "a.tar").write_bytes((folder / "b.tar").read_bytes())
        with pytest.raises(TransferError):
            read_range(url, START, STOP, SIZE, etag, 10)
        with pytest.raises(TransferError):
            read_range(url, START, STOP, SIZE + 1, None, 10)


def test_a_server_without_ranges_is_not_read_on(folder):
    (folder / "large.tar").write_bytes(bytes(50_000_000))
    with FaultyServer(folder, ranges=False) as server:
        with pytest.raises(TransferError, match="does not send ranges"):
            read_range(f"{server.url}/large.tar", START, STOP, None, None, 10)
        assert server.requests[0].sent < 40_000_000


def test_a_range_beyond_the_end(folder):
    with FaultyServer(folder) as server:
        for start, stop in ((SIZE, SIZE + 1), (SIZE - 1, SIZE + 1)):
            with pytest.raises(TransferError):
                read_range(f"{server.url}/a.tar", start, stop, None, None, 10)


def test_of_object_stores(folder, bucket, either_way):
    url, data = f"s3://{bucket.name}/shards/a.tar", (folder / "a.tar").read_bytes()
    assert read_range(url, START, STOP, SIZE, None, 10) == data[START:STOP]
    for start, stop, size in ((START, STOP, SIZE + 1), (SIZE - 1, SIZE + 1, SIZE), (SIZE, SIZE + 1, SIZE)):
        with pytest.raises(TransferError):
            read_range(url, start, stop, size, None, 10)
    with pytest.raises(TransferError):
        read_range(url, START, STOP, SIZE, '"another"', 10)
    with pytest.raises(TransferError):
        read_range(f"s3://{bucket.name}/shards/none.tar", START, STOP, SIZE, None, 10)


def test_of_more_than_one_range_of_an_object_store(bucket, either_way):
    data = bytes(range(256)) * (100 << 10)
    bucket.put("large.tar", data)
    url = f"s3://{bucket.name}/large.tar"
    assert read_range(url, 77, 20_000_077, len(data), None, 30) == data[77:20_000_077]


@pytest.mark.parametrize("fault", ["500", "a stall", "a trickle", "a cut", "a reset"])
def test_faults_of_object_stores(bucket, either_way, monkeypatch, fault):
    with FaultyProxy(bucket.server, {"*": FAULTS[fault]}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(TransferError):
            read_range(f"s3://{bucket.name}/shards/a.tar", START, STOP, SIZE, None, SHORT_S)


def test_where_it_can_be_tried():
    assert all(map(has_ranges, ("http://host/a.tar", "https://host/a.tar", "s3://bucket/a.tar", "gs://bucket/a.tar")))
    assert not any(map(has_ranges, ("hf://datasets/x/a.tar", "file:///a.tar", "pipe:cat a.tar", "/a.tar")))
