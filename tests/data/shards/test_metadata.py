"""Metadata of samples: found in the same places with and without an index, counted, and from anybody."""

import io
import json

import pytest

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.shards.metadata import MAX_METADATA_BYTES, MetadataFilter, read_metadata
from maskmatch_scale.data.shards.sequence import read_in_sequence
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.recipe.where import Where
from tests.data import bad_shards

WIDE = json.dumps({"width": 700}).encode()
NARROW = json.dumps({"width": 300}).encode()
MEMBERS = [
    ("a.json", WIDE),  # before its image
    ("a.jpg", bad_shards.jpeg(1)),
    ("__meta__.json", NARROW),
    ("b.jpg", bad_shards.jpeg(2)),
    ("b.JSON", NARROW),
    ("c.jpg", bad_shards.jpeg(3)),  # has none
    ("d.txt", b"no image"),
    ("d.json", WIDE),
    bad_shards.special("e.json", b"2", "a.json"),  # a link is not followed
    ("e.jpg", bad_shards.jpeg(4)),
    ("f.jpg", bad_shards.jpeg(5)),
    ("f.json", b" " * MAX_METADATA_BYTES + WIDE),
    ("g.jpg", bad_shards.jpeg(6)),
    ("g.json", WIDE),
    ("folder/h.jpg", bad_shards.jpeg(7)),
    ("folder/h.json", b"[" * 100_000),
    ("i.jpg", bad_shards.jpeg(8)),
    ("i.json", b""),
]


def test_places_are_those_of_the_table():
    data = bad_shards.tar_bytes(MEMBERS)
    found = list(read_metadata(io.BytesIO(data), "x.tar"))
    assert found == [WIDE, NARROW, None, WIDE, None, None, WIDE, b"[" * 100_000, b""]
    assert len(read_table(io.BytesIO(data), "x.tar", labelled=False)) == len(found)


def test_in_sequence_the_same_samples_are_wanted():
    data, asked = bad_shards.tar_bytes(MEMBERS), []

    def wanted(content):
        asked.append(content)
        return content == WIDE

    found = list(read_in_sequence(io.BytesIO(data), "x.tar", wanted))
    assert asked == list(read_metadata(io.BytesIO(data), "x.tar"))
    assert [one.key for one in found] == ["a", "b", "c", "d", "e", "f", "g", "folder/h", "i"]
    assert [one.sample is not None for one in found] == [content == WIDE for content in asked]
    # What is wanted is as it is without a condition; the bad sample too.
    everything = list(read_in_sequence(io.BytesIO(data), "x.tar"))
    for one, other in zip(found, everything, strict=True):
        if one.sample is not None:
            assert (one.key, getattr(one.sample, "image", None)) == (other.key, getattr(other.sample, "image", None))
            assert str(getattr(one.sample, "reason", "")) == str(getattr(other.sample, "reason", ""))


@pytest.mark.parametrize("cut", range(600, 14_000, 977))
def test_of_a_shard_that_ends_early_the_same_is_wrong(cut):
    data = bad_shards.tar_bytes(MEMBERS[3:6] + MEMBERS[12:14])[:cut]
    plain = list(read_in_sequence(io.BytesIO(data), "x.tar"))
    wanted = list(read_in_sequence(io.BytesIO(data), "x.tar", lambda content: True))
    assert [(one.key, str(one.sample)) for one in wanted] == [(one.key, str(one.sample)) for one in plain]


def test_no_tar():
    with pytest.raises(BadSample, match=r"x\.tar: not a tar"):
        list(read_metadata(io.BytesIO(b"<html>" * 200), "x.tar"))


def test_what_is_counted():
    chosen = MetadataFilter(Where("width > 512 and similarity > 0.3"))
    contents = [{"width": 600, "similarity": 0.4}, {"width": 600}, {"width": 3}, {"width": "600", "similarity": 1}]
    assert [chosen(json.dumps(content).encode()) for content in contents] == [True, False, False, False]
    assert not any(map(chosen, (None, b"", b"[1]", b"{", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}")))
    assert (chosen.samples, chosen.chosen, chosen.undecided, chosen.without) == (10, 1, 2, 6)
    assert chosen.fault() is None


@pytest.mark.parametrize(
    ("where", "contents", "message"),
    [
        (
            "similarty > 3",
            [{"similarity": 4, "exif": {"iso": 3}}],
            "has a field 'similarty'; there are exif, exif.iso, sim",
        ),
        ("exif.isoo > 3", [{"exif": {"iso": 3}}], r"has a field 'exif\.isoo'; there are exif, exif\.iso"),
        ("a > 3", [{"a": None}, {"a": "4"}], r"none of 2 samples is like that \(2 of them lack a field"),
        ("a > 3", [{"a": 1}], "none of 1 samples is like that; choose"),
        ("a > 3", [[], 3], r"none of 2 samples has a \.json member"),
        (
            "b > 3 or z > 3",
            [{"b": 4, **{f"f{n:03d}": 0 for n in range(500)}}],
            r"a field 'z'; there are b, f000, .*f018, …$",
        ),
    ],
)
def test_conditions_that_are_of_no_use(where, contents, message):
    chosen, other = MetadataFilter(Where(where)), MetadataFilter(Where(where))
    for content in contents:
        other(json.dumps(content).encode())
    chosen.add(other)
    fault = chosen.fault()
    assert fault is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(fault)


def test_names_of_fields_may_be_anything():
    """They come from strangers: they make no second line, no escape sequence, and no long message."""
    chosen = MetadataFilter(Where("b > 3"))
    chosen(json.dumps({"a\nline": 1, "\x1b[31m": 1, "\ud800": 1, "x" * 10_000: 1, "größe": 1}).encode())
    fault = chosen.fault()
    assert fault is not None
    assert fault.isprintable()
    assert r"there are '\x1b[31m', 'a\nline', größe, xxx" in fault
    assert len(fault) < 300


def test_few_names_of_fields_are_kept_however_many_there_are():
    total = MetadataFilter(Where("b > 3"))
    for shard in range(5):
        own = MetadataFilter(Where("b > 3"))
        for sample in range(3):
            own(json.dumps({f"{shard}-{sample}-{n}": {"a": n, "c": n} for n in range(150)}).encode())
        total.add(own)
        assert len(own.names) == len(total.names) == 200
