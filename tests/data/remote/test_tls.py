"""TLS with a certificate of one's own, and connections that are kept."""

import shutil
import subprocess

import pytest

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.remote import http, objects, stores
from maskmatch_scale.data.remote.shard_cache import ShardCache
from tests.data.faulty_server import Fault, FaultyProxy, FaultyServer
from tests.data.remote.common import SIZE, known


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Files: an authority's certificate; a certificate that it signed for 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=tests")
    openssl("req", *key, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=127.0.0.1")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    openssl(
        *("x509", "-req", "-in", "own.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"),
        *("-extfile", "extensions", "-out", "own.pem"),
    )
    return folder / "ca.pem", (folder / "own.pem", folder / "own.key")


@pytest.fixture
def no_pools(monkeypatch):
    """No connections of earlier tests, which know other certificates."""
    monkeypatch.setattr(http, "_pools", {})


def test_https(folder, options, certificates, no_pools, monkeypatch):
    authority, own = certificates
    with FaultyServer(folder, {"a.tar": Fault(times=1, cut_after=100_000)}, tls=own) as server:
        url = f"{server.url}/a.tar"
        with pytest.raises(BadSample, match=r"tried 3 times and failed: TLS: .*SSL_CERT_FILE names a bundle"):
            ShardCache(options).fetch(url)
        assert server.gets() == 0
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        http._pools.clear()
        path = ShardCache(options).fetch(url, **known(folder / "a.tar"))
        assert path.read_bytes() == (folder / "a.tar").read_bytes()
        assert [request.sent for request in server.requests] == [100_000, SIZE - 100_000]


def test_object_stores(folder, options, certificates, bucket, either_way, monkeypatch):
    authority, own = certificates
    with FaultyProxy(bucket.server, {"*": Fault(times=1, cut_after=100_000)}, tls=own) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.delenv("AWS_ALLOW_HTTP")
        url = f"s3://{bucket.name}/shards/a.tar"
        with pytest.raises(BadSample, match=r"tried 3 times and failed: TLS: .*SSL_CERT_FILE names a bundle"):
            ShardCache(options).fetch(url)
        assert proxy.gets() == 0
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        stores._stores.clear()
        objects.store_process.end_all()
        path = ShardCache(options).fetch(url, **known(folder / "a.tar"))
        assert path.read_bytes() == (folder / "a.tar").read_bytes()
        assert [request.sent for request in proxy.requests] == [100_000, SIZE - 100_000]


def test_http_connections_are_kept(folder, options, no_pools):
    with FaultyServer(folder) as server:
        cache = ShardCache(options)
        for name in "abcdefgh":
            cache.fetch(f"{server.url}/{name}.tar", **known(folder / f"{name}.tar"))
        assert server.gets() == 8
        assert server.connections == 1


def test_connections_to_object_stores_are_kept(folder, options, bucket, either_way, monkeypatch):
    with FaultyProxy(bucket.server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        cache = ShardCache(options)
        for name in "abcdefgh":
            cache.fetch(f"s3://{bucket.name}/shards/{name}.tar", **known(folder / f"{name}.tar"))
        assert proxy.gets() == 8
        assert proxy.connections == 1
