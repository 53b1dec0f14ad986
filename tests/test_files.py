"""A file is there whole, or as it was, and nothing else is left."""

import os

import pytest

from maskmatch_scale.files import write_whole


@pytest.mark.parametrize("content", ["größer", b"\x00\xff"])
def test_a_file_is_written_and_replaced(tmp_path, content):
    path = tmp_path / "a.json"
    for expected in (content, "second"):
        write_whole(path, expected)
        assert path.read_bytes() == (expected.encode() if isinstance(expected, str) else expected)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / ".plan.json"
    write_whole(path, "before")

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
