"""Addresses and texts as messages, logs and records show them."""

from pathlib import Path

import pytest

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.errors import TrainingStopped, UserError
from maskmatch_scale.redact import has_secret, is_remote, redacted, redacted_values, shown


def test_what_is_remote(tmp_path):
    for location in ("http://h/x.tar", "s3://b/x", "gs://b", "memory://x", "file:///x", "pipe:cat x", "a+b::c://x"):
        assert is_remote(location)
    for location in ("x.tar", "/data/x.tar", "data:x", "pipes/x", tmp_path, Path("http://h/x")):
        assert not is_remote(location)


def test_what_is_shown_holds_no_secrets():
    assert shown("https://user:pass@h:1/d/x.tar?X-Amz-Signature=1#f") == "https://h:1/d/x.tar"
    assert shown("s3://key:secret@bucket/x.tar") == "s3://bucket/x.tar"
    command = "pipe:TOKEN=abc/x.tar /usr/bin/curl -H 'Authorization: Bearer xyz' 'https://u:p@h/x-01.tar?sig=1' | cat"
    assert shown(command) == "pipe:curl … https://h/x-01.tar"
    assert shown("data/odd?.tar") == "data/odd?.tar"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://me:hunter2@h:8080/a@b.tar", "https://h:8080/a@b.tar"),
        ("https://hunter2@h/x", "https://h/x"),
        ("https://me:hunter2/2@h/x", "https://h/x"),
        ("https://me:hunter2?2#@h/x", "https://h/x"),
        ("https://me:hunter2@hunter2@h/x", "https://h/x"),
        ("https://h/x?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2", "https://h/x"),
        ("https://a.blob.core.windows.net/c/x.tar?sv=2020&sig=hunter2%3D", "https://a.blob.core.windows.net/c/x.tar"),
        ("https://h/x.tar?token=hunter2", "https://h/x.tar"),
        ("https://h/x.tar#hunter2", "https://h/x.tar"),
        ("filecache::https://me:hunter2@h/x", "filecache::https://h/x"),
        ("zip://a.tar::https://me:hunter2@h/x.zip?sig=hunter2", "zip://a.tar::https://h/x.zip"),
        ("https://h:443/x-{000..127}.tar", "https://h:443/x-{000..127}.tar"),
        ("file://C:/x@y.tar", "file://C:/x@y.tar"),
    ],
)  # fmt: skip
def test_addresses(address, expected):
    assert shown(address) == expected
    for sentence in ("{}: cut off", "({}, twice)", "no '{}' there", 'data.root="{}"', "{}"):
        assert redacted(sentence.format(address)) == sentence.format(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no url: /x.tar?sig=hunter2 (Caused by …)", "no url: /x.tar (Caused by …)"),
        ("curl -H 'Authorization: Bearer hunter2' x", "curl -H 'Authorization: …' x"),
        ('{"authorization": "hunter2"}', '{"authorization": "…"}'),
        ("unknown key a=b; did you mean c?", "unknown key a=b; did you mean c?"),
        ("is it another size?", "is it another size?"),
    ],
)  # fmt: skip
def test_texts(text, expected):
    assert redacted(text) == expected


def test_values_of_a_recipe():
    recipe = {
        "data": {"root": "s3://me:hunter2@b/x", "unlabelled": [{"root": "pipe:TOKEN=hunter2 curl x.tar"}], "n": 1}
    }
    assert redacted_values(recipe) == {
        "data": {"root": "s3://b/x", "unlabelled": [{"root": "pipe:curl … x.tar"}], "n": 1}
    }
    assert has_secret(recipe)
    assert not has_secret({"data": {"root": "s3://b/x", "labelled": [], "keep": 0.3}})


@pytest.mark.parametrize("error", [UserError, TrainingStopped, lambda text: BadSample("empty", text)])
def test_errors_hold_no_secrets(error):
    assert str(error("https://me:hunter2@h/x.tar?a=hunter2: empty")) == "https://h/x.tar: empty"
