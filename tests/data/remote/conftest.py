"""A folder of files to serve, and how they are fetched."""

from __future__ import annotations

import itertools
import os
import random

import pytest

from maskmatch_scale.data.remote import fetch, objects, store_process, stores
from maskmatch_scale.data.remote.transfer import FetchOptions
from tests.data import s3_server as s3
from tests.data.remote.common import SIZE

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    backoff = fetch._backoff
    monkeypatch.setattr(fetch, "_backoff", lambda attempt, timeout_s: backoff(attempt, timeout_s) / 20)


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
    return FetchOptions(tmp_path / "cache", limit_bytes=100 * SIZE, timeout_s=10, attempts=3)


@pytest.fixture
def clean_stores(monkeypatch):
    """No credentials of the user's, and no store that an earlier test has opened."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    stores._stores.clear()
    store_process.end_all()
    yield
    stores._stores.clear()
    store_process.end_all()


@pytest.fixture
def bucket(s3_server, folder, clean_stores, monkeypatch):
    """A bucket with a.tar … h.tar of ``folder``, and the environment to read it, without any fault."""
    bucket = s3.Bucket(s3_server, f"bucket{next(_numbers)}").make()
    for file in sorted(folder.iterdir()):
        bucket.put(f"shards/{file.name}", file.read_bytes())
    for name, value in s3.SIGNED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_server}")
    return bucket


@pytest.fixture(params=["by its process", "here"])
def either_way(request, monkeypatch):
    """Object stores are asked by a process of their own, and in this process."""
    monkeypatch.setattr(objects, "_may_be_asked_here", lambda: request.param == "here")
