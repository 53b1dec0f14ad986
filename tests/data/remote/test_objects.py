"""Files from a real S3 server, with faults on the way, and from servers that answer as other stores do."""

import dataclasses
import threading

import pytest

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote import fetch as fetching
from maskmatch_scale.data.remote import objects, stores
from maskmatch_scale.data.remote.fetch import read_bytes
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.remote.transfer import TransferError
from tests.data import s3_server as s3
from tests.data.faulty_server import Fault, FaultyProxy, FaultyServer
from tests.data.remote.common import SHORT_S, SIZE, files_in, known, wait_until

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
SURVIVED = {
    "503 twice": [Fault(times=2, status=503, body=SLOW_DOWN)],
    "a stall before the first byte": [Fault(times=1, stall_after=0)],
    "a stall": [Fault(times=1, stall_after=100_000)],
    "a trickle": [Fault(times=1, trickle_after=100_000)],
    "no head": [Fault(times=1, delay_s=1)],
    "a cut": [Fault(times=1, cut_after=100_000)],
    "two cuts": [Fault(times=2, cut_after=100_000)],
    "a reset": [Fault(times=1, cut_after=100_000, reset=True)],
    "wrong bytes": [Fault(times=2, wrong_bytes=True)],
    "wrong bytes and a cut": [Fault(times=1, wrong_bytes=True, cut_after=100_000)],
}


@pytest.fixture
def proxy(bucket, monkeypatch):
    """A proxy in front of the server, which the environment names; it has no faults yet."""
    with FaultyProxy(bucket.server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.mark.parametrize("fault", SURVIVED)
def test_faults_that_pass(folder, options, proxy, bucket, either_way, fault):
    waits = any(word in fault for word in ("stall", "trickle", "no head"))
    options = dataclasses.replace(options, timeout_s=SHORT_S if waits else 10, attempts=6)
    proxy.set_faults({f"{bucket.name}/shards/a.tar": SURVIVED[fault]})
    path = ShardCache(options).fetch(f"s3://{bucket.name}/shards/a.tar", **known(folder / "a.tar"))
    assert path.read_bytes() == (folder / "a.tar").read_bytes()
    assert proxy.gets() >= 2
    assert files_in(options.cache) == [path.name]


def test_a_cut_goes_on_where_it_was(folder, options, proxy, bucket, either_way):
    proxy.set_faults({"*": Fault(times=1, cut_after=100_000)})
    path = ShardCache(options).fetch(f"s3://{bucket.name}/shards/a.tar")
    assert path.read_bytes() == (folder / "a.tar").read_bytes()
    first, second = proxy.requests
    assert (first.range, first.headers["If-Match"], first.sent) == (f"bytes=0-{stores.RANGE - 1}", None, 100_000)
    assert second.range.startswith("bytes=100000-")
    assert second.headers["If-Match"].startswith('"')
    assert second.sent == SIZE - 100_000


def test_an_object_that_changes_between_two_tries(folder, options, proxy, bucket, either_way):
    proxy.set_faults({"*": Fault(times=1, cut_after=100_000)})
    done: list[bytes] = []
    url = f"s3://{bucket.name}/shards/a.tar"
    fetch = threading.Thread(target=lambda: done.append(ShardCache(options).fetch(url).read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "_backoff", lambda *_: 0.5)
        fetch.start()
        wait_until(lambda: proxy.gets() == 1 and proxy.open_requests == 0)
        bucket.put("shards/a.tar", (folder / "b.tar").read_bytes())
        fetch.join()
    assert done == [(folder / "b.tar").read_bytes()]
    assert [request.range for request in proxy.requests][1].startswith("bytes=100000-")
    assert proxy.requests[2].range.startswith("bytes=0-")


def test_ranges_side_by_side(folder, options, proxy, bucket, monkeypatch):
    monkeypatch.setattr(objects, "_may_be_asked_here", lambda: True)
    monkeypatch.setattr(stores, "RANGE", 50_000)
    proxy.set_faults({"*": [Fault(times=1), Fault(times=3, delay_s=1.0)]})
    done: list[bytes] = []
    url, facts = f"s3://{bucket.name}/shards/a.tar", known(folder / "a.tar")
    fetch = threading.Thread(target=lambda: done.append(ShardCache(options).fetch(url, **facts).read_bytes()))
    fetch.start()
    wait_until(lambda: proxy.open_requests == 3)
    fetch.join()
    assert done == [(folder / "a.tar").read_bytes()]
    assert len({request.range for request in proxy.requests}) == SIZE // 50_000
    assert len({request.headers["If-Match"] for request in proxy.requests[1:]}) == 1
    assert sum(request.sent for request in proxy.requests) == SIZE


def test_a_cut_among_ranges(folder, options, proxy, bucket, monkeypatch):
    monkeypatch.setattr(objects, "_may_be_asked_here", lambda: True)
    monkeypatch.setattr(stores, "RANGE", 50_000)
    proxy.set_faults({"*": [Fault(times=2), Fault(times=1, cut_after=10_000)]})
    path = ShardCache(options).fetch(f"s3://{bucket.name}/shards/a.tar", **known(folder / "a.tar"))
    assert path.read_bytes() == (folder / "a.tar").read_bytes()
    assert sum(request.sent for request in proxy.requests) < SIZE + 4 * 50_000


def test_a_large_object(options, bucket, either_way):
    data = bytes(range(256)) * 80_000  # 20 MB: three ranges
    bucket.put("large.tar", data)
    assert read_bytes(f"s3://{bucket.name}/large.tar", options) == data


def test_keys_are_not_escaped(options, bucket, either_way):
    bucket.put("empty.json", b"")
    for key in ("a b#1+c=d&e.tar", "a%20b.tar", "é/[x].tar"):
        bucket.put(key, key.encode())
        assert read_bytes(f"s3://{bucket.name}/{key}", options) == key.encode()
    assert read_bytes(f"s3://{bucket.name}/empty.json", options) == b""


DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>k hush</Message></Error>"
GIVEN_UP = {
    "403": (Fault(status=403, body=DENIED), "once", "HTTP 403 AccessDenied; check the permissions; set AWS_ACCESS_KEY"),
    "401": (Fault(status=401), "once", "HTTP 401; check the credentials; set AWS_ACCESS_KEY_ID"),
    "301": (Fault(status=301), "once", "the bucket is in another region; set AWS_REGION"),
    "503": (Fault(status=503, body=SLOW_DOWN), "2 times", "HTTP 503 SlowDown; check the network"),
    "a cut": (Fault(cut_after=0), "2 times", "the connection was cut; check the network"),
    "a stall": (Fault(stall_after=1000), "2 times", "stalled: no byte in"),
    "a trickle": (Fault(trickle_after=1000), "2 times", "stalled: .* bytes in"),
    "wrong bytes": (Fault(wrong_bytes=True), "2 times", "its bytes are not those the index has the checksum of"),
}


@pytest.mark.parametrize("fault", GIVEN_UP)
def test_faults_that_do_not_pass(folder, options, proxy, bucket, either_way, fault):
    given, tries, message = GIVEN_UP[fault]
    options = dataclasses.replace(options, timeout_s=SHORT_S if "stalled" in message else 10, attempts=2)
    proxy.set_faults({"*": given})
    url = f"s3://{bucket.name}/shards/a.tar"
    with pytest.raises(BadSample, match=rf"^{url}: tried {tries} and failed: {message}") as caught:
        ShardCache(options).fetch(url, **known(folder / "a.tar"))
    assert "hush" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_in(options.cache) == []


def test_objects_that_are_not_there(options, bucket, either_way):
    with pytest.raises(BadSample, match="tried once and failed: HTTP 404 NoSuchKey; check the address"):
        ShardCache(options).fetch(f"s3://{bucket.name}/shards/none.tar")
    with pytest.raises(BadSample, match="tried once and failed: HTTP 404 NoSuchBucket"):
        ShardCache(options).fetch("s3://nobody/x.tar")
    with pytest.raises(BadSample, match=r"tried 3 times and failed: \d+ bytes where 5 are expected"):
        ShardCache(options).fetch(f"s3://{bucket.name}/shards/a.tar", 5)


def test_one_address_at_two_servers(options, bucket, monkeypatch):
    """Where no checksum is known, what came from one is not taken for what is at the other one."""
    cache, url = ShardCache(options), f"s3://{bucket.name}/x.tar"
    bucket.put("x.tar", b"one")
    assert cache.fetch(url, 3).read_bytes() == b"one"
    with s3.running() as other:
        s3.Bucket(other, bucket.name).make().put("x.tar", b"two")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{other}")
        objects.store_process.end_all()
        assert cache.fetch(url, 3).read_bytes() == b"two"


def test_credentials(options, bucket, either_way, monkeypatch):
    bucket.put("public.tar", b"for all", public=True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with FaultyServer(options.cache) as cloud:  # which has no credentials for this machine
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", cloud.url)
        with pytest.raises(DataError, match=r"no credentials, neither .* AWS_SKIP_SIGNATURE=true for a public bucket"):
            read_bytes(f"s3://{bucket.name}/public.tar", options)
    stores._stores.clear()
    objects.store_process.end_all()
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert read_bytes(f"s3://{bucket.name}/public.tar", options) == b"for all"
    with pytest.raises(DataError, match="HTTP 403"):
        read_bytes(f"s3://{bucket.name}/shards/a.tar", options)


def test_stores_that_cannot_be_asked(options, clean_stores, either_way, monkeypatch):
    with FaultyServer(options.cache) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    for url, message in (
        ("s3://bucket/x.tar", "once and failed: http:// is not allowed; AWS_ALLOW_HTTP=true"),
        ("s3:///x.tar", "once and failed: not a valid address; write s3://bucket/folder/x.tar"),
        ("s3://bu cket/x.tar", r"once and failed: not a valid address \(invalid domain"),
        (
            "s3://bucket/d//x.tar",
            r"once and failed: the name 'd//x\.tar' has an empty part \(//\), and cannot be read; rename the object",
        ),
        ("az://container/x.tar", "once and failed: it names no account; set AZURE_STORAGE_ACCOUNT_NAME"),
    ):
        with pytest.raises(BadSample, match=message):
            ShardCache(options).fetch(url)
    stores._stores.clear()
    objects.store_process.end_all()
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with pytest.raises(BadSample, match="tried 3 times and failed: no connection"):
        ShardCache(options).fetch("s3://bucket/x.tar")


OTHERS = {
    "gs://bucket/d/a.tar": {
        "GOOGLE_SKIP_SIGNATURE": "true",
        "GOOGLE_ALLOW_HTTP": "true",
        "GOOGLE_BASE_URL": "URL",
    },
    "az://bucket/d/a.tar": {
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_SKIP_SIGNATURE": "true",
        "AZURE_ALLOW_HTTP": "true",
        "AZURE_STORAGE_ENDPOINT": "URL",
    },
}
OTHERS["gcs://bucket/d/a.tar"] = OTHERS["gs://bucket/d/a.tar"]
OTHERS["abfs://bucket/d/a.tar"] = OTHERS["az://bucket/d/a.tar"]


@pytest.mark.parametrize("url", OTHERS)
def test_other_stores(folder, options, clean_stores, either_way, monkeypatch, url):
    """Against a server that answers GET as these stores do. The stores themselves are not tested."""
    (folder / "bucket" / "d").mkdir(parents=True)
    a = folder / "bucket" / "d" / "a.tar"
    a.write_bytes((folder / "a.tar").read_bytes())
    with FaultyServer(folder, {"*": Fault(times=1, cut_after=100_000)}) as server:
        for name, value in OTHERS[url].items():
            monkeypatch.setenv(name, value.replace("URL", server.url))
        assert ShardCache(options).fetch(url, **known(a)).read_bytes() == a.read_bytes()
        assert [request.path for request in server.requests] == ["bucket/d/a.tar"] * 2
        with pytest.raises(BadSample, match="tried once and failed: HTTP 404"):
            ShardCache(options).fetch(url.replace("a.tar", "b.tar"))


def test_a_store_that_does_not_look_at_etags(folder, clean_stores, monkeypatch):
    """Ranges of two versions are not put together, neither in one try nor in two."""
    monkeypatch.setattr(stores, "RANGE", SIZE // 2)
    monkeypatch.setattr(stores, "_RANGES_AT_ONCE", 1)
    (folder / "bucket").mkdir()
    a = folder / "bucket" / "a.tar"
    a.write_bytes((folder / "a.tar").read_bytes())
    with FaultyServer(folder, conditions=False) as server:
        for name, value in OTHERS["gs://bucket/d/a.tar"].items():
            monkeypatch.setenv(name, value.replace("URL", server.url))
        with stores.reading("gs://bucket/a.tar", 0, None, 10) as body:
            next(body.blocks)
            a.write_bytes((folder / "b.tar").read_bytes())
            with pytest.raises(TransferError, match="it has changed") as caught:
                list(body.blocks)
        assert caught.value.restart
        with (
            pytest.raises(TransferError, match="it has changed"),
            stores.reading("gs://bucket/a.tar", 100, body.version, 10),
        ):
            pass


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs"), ("abfss", "azure")])
def test_without_obstore(options, monkeypatch, scheme, extra):
    monkeypatch.setattr(objects, "_may_be_asked_here", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(
        DataError, match=rf"{scheme}:// needs obstore.*pip install 'maskmatch_scale\[{extra}\]'$"
    ) as caught:
        ShardCache(options).fetch(f"{scheme}://bucket/x.tar")
    assert not isinstance(caught.value, BadSample)
