"""Addresses of files: how they are joined and expanded."""

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote.address import expand, join


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


def test_expand(folder):
    assert expand("https://h/x-{008..010}.tar") == [f"https://h/x-{number}.tar" for number in ("008", "009", "010")]
    assert expand("s3://b/{a,b}-{0..1}.tar") == [f"s3://b/{name}.tar" for name in ("a-0", "a-1", "b-0", "b-1")]
    assert expand(f"{folder}/{{c,a}}.tar") == [f"{folder}/c.tar", f"{folder}/a.tar"]
    assert expand(f"{folder}/[a-c].*") == [f"{folder}/{name}.tar" for name in "abc"]
    assert expand("https://h/x.tar?a=*") == ["https://h/x.tar?a=*"]
    assert expand("pipe:cat *.tar") == ["pipe:cat *.tar"]
    (folder / "odd[1].tar").touch()
    assert expand(f"{folder}/odd[1].tar") == [f"{folder}/odd[1].tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/{{a..z}}.tar", "i.tar: no such file"),
        ("{folder}/*.zip", "no such file"),
        ("{folder}/{{a", "no such file|braces do not match"),
        ("s3://b/*.tar", "for local folders only"),
        ("https://h/{{0..99999999}}", "more than"),
    ],
)
def test_patterns_that_match_nothing(folder, pattern, message):
    with pytest.raises(DataError, match=message):
        expand(pattern.format(folder=folder))
