"""Addresses of files: how they are joined."""

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote.address import join


@pytest.mark.parametrize(
    ("root", "file", "joined"),
    [
        ("data", "x.tar", "data/x.tar"),
        ("data/index.json", "sub/x.tar", "data/sub/x.tar"),
        ("data", "/other/x.tar", "/other/x.tar"),
        ("data", "https://h/x.tar", "https://h/x.tar"),
        ("https://h/d/", "x.tar", "https://h/d/x.tar"),
        ("https://h/d/index.json?sig=1", "x.tar", "https://h/d/x.tar?sig=1"),
        ("https://h/d?sig=1/2", "a b#1.tar", "https://h/d/a%20b%231.tar?sig=1/2"),
        ("https://h", "x.tar", "https://h/x.tar"),
        ("https://h/d", "/local/x.tar", "/local/x.tar"),
        ("https://h/d", "pipe:cat x", "pipe:cat x"),
        ("s3://bucket/d", "a b#1.tar", "s3://bucket/d/a b#1.tar"),
        ("s3://bucket/d/e", "../x.tar", "s3://bucket/d/x.tar"),
        ("s3://bucket", "./x.tar", "s3://bucket/x.tar"),
        ("file:///data/d", "../../../x.tar", "file:///x.tar"),
    ],
)
def test_join(root, file, joined):
    assert join(root, file) == joined


def test_a_pipe_is_no_folder():
    with pytest.raises(DataError, match="a pipe is one file"):
        join("pipe:cat x", "y.tar")
