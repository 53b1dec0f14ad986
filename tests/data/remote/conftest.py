"""A folder of files to serve, and how they are fetched."""

from __future__ import annotations

import random

import pytest

from maskmatch_scale.data.remote import fetch
from maskmatch_scale.data.remote.transfer import FetchOptions
from tests.data.remote.common import SIZE


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
