"""Servers on this machine in place of those that pages speak of: `<!-- page test: serve NAME -->`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.data.faulty_server import FaultyServer
from tests.export.hub_server import TOKEN, HubServer


@contextmanager
def hub(_: Path) -> Iterator[Mapping[str, str]]:
    """A hub that takes pushes; gives the environment of one who is logged in there."""
    with HubServer() as server:
        yield {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        assert server.commits
        assert server.unknown == []


@contextmanager
def web(folder: Path) -> Iterator[Mapping[str, str]]:
    """The files of the folder, at the address $WEB."""
    with FaultyServer(folder) as server:
        yield {"WEB": server.url}
        assert server.requests


SERVED = {"hub": hub, "web": web}
