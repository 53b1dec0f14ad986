"""Files that a command prints."""

import dataclasses

import pytest

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote.fetch import read_bytes
from maskmatch_scale.data.remote.shard_cache import ShardCache
from tests.data.remote.common import SHORT_S, SIZE, known


def test_a_pipe_needs_leave(folder, options):
    url = f"pipe:cat {folder}/a.tar"
    for fetch in (ShardCache(options).fetch, lambda url: read_bytes(url, options)):
        with pytest.raises(DataError, match=r"runs a shell command.*data\.allow_pipe=true") as caught:
            fetch(url)
        assert not isinstance(caught.value, BadSample)


def test_pipes(folder, options):
    options = dataclasses.replace(options, allow_pipe=True)
    cache = ShardCache(options)
    a = folder / "a.tar"
    assert cache.fetch(f"pipe:cat {a} | cat", **known(a)).read_bytes() == a.read_bytes()
    assert read_bytes(f"pipe:cat {a}", options) == a.read_bytes()
    once = folder / "once"
    flaky = f"pipe:test -e {once} || {{ touch {once}; head -c 1000 {a}; exit 3; }}; cat {a}"
    assert cache.fetch(flaky).read_bytes() == a.read_bytes()
    for command, message in (
        (f"echo password no >&2; echo so $KEY >&2; exit 7; cat {a}", r"ended with code 7 \(so\); try it in a shell"),
        (f"head -c 1000 {a}; sleep 60", f"stalled: no byte in {SHORT_S} s"),
        (f"while :; do printf x; sleep 0.05; done; cat {a}", "stalled: .* bytes in"),
        (f"cat {a}; exec >&-; sleep 60", "the command does not end"),
        (f"head -c 1000 {a}", f"cut after 1000 of {SIZE} bytes"),
        (f"cat {a} {a}", f"more than the {SIZE} bytes"),
        (f"cat {folder}/b.tar", "checksum"),
    ):
        waits = "stalled" in message or "end" in message.split()
        failing = dataclasses.replace(options, timeout_s=SHORT_S if waits else 10, attempts=2, cache=folder / "cache")
        with pytest.raises(BadSample, match=rf"^pipe:.*tried 2 times and failed: .*{message}"):
            ShardCache(failing).fetch(f"pipe:{command}", **known(a))
