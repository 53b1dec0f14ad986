"""Tries, the pauses between them, and small files in memory."""

import dataclasses
import random
from datetime import datetime, timedelta, timezone

import pytest

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote import fetch
from maskmatch_scale.data.remote.fetch import read_bytes
from tests.data.faulty_server import Fault, FaultyServer

backoff = fetch._backoff
"""Without what the fixture `short_pauses` makes of it."""


def test_pauses(options, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(fetch.time, "sleep", pauses.append)
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
