"""A real S3 server (moto's), and what the tests put into it."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

_VARIABLE = "MASKMATCH_MOTO_SERVER"
MISSING = f"no moto_server beside python, on PATH or in {_VARIABLE}"

SIGNED = {
    "AWS_ACCESS_KEY_ID": "k",
    "AWS_SECRET_ACCESS_KEY": "hush",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
"""The environment of someone who may read."""


def moto_server() -> str | None:
    """The command that starts moto's server, or None."""
    beside = Path(sys.executable).with_name("moto_server")
    return os.environ.get(_VARIABLE) or (str(beside) if beside.exists() else shutil.which("moto_server"))


@contextmanager
def running() -> Iterator[str]:
    """The server, in a process of its own; yields ``HOST:PORT``."""
    command = moto_server()
    assert command is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [command, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, f"{command} has ended"
            assert time.monotonic() < deadline, f"{command} does not answer"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Bucket:
    """A bucket of a server at ``HOST:PORT``. The server checks no signature, but wants one where nothing is public."""

    server: str
    name: str

    def make(self) -> Bucket:
        self._put(f"/{self.name}", b"")
        return self

    def put(self, key: str, data: bytes, *, public: bool = False) -> None:
        self._put(f"/{self.name}/{quote(key)}", data, {"x-amz-acl": "public-read"} if public else {})

    def _put(self, path: str, data: bytes, headers: Mapping[str, str] = {}) -> None:
        signature = "AWS4-HMAC-SHA256 Credential=k/20300101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        connection = http.client.HTTPConnection(self.server, timeout=60)
        connection.request("PUT", path, data, {"Authorization": signature, **headers})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()
