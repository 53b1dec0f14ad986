"""The tar parser against tarfile."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.shards.members import TarMembers
from tests.data.bad_shards import FORMATS, checksummed, tar_bytes


def headers_of(data):
    return list(TarMembers(io.BytesIO(data), "s.tar"))


def as_tarfile_sees(data):
    """What tarfile yields, in the parser's terms."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", errors="backslashreplace") as tar:
        return [
            (m.name, b"S" if m.issparse() else b"0" if m.type in b"\x007" else m.type, m.offset_data, m.size)
            for m in tar
        ]


def as_parser_sees(data):
    return [
        (name.rstrip("/") if flag == ord("5") else name, b"0" if flag in (0, ord("7")) else bytes([flag]), offset, size)
        for name, flag, offset, size in headers_of(data)
    ]


parts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/\0"), min_size=1, max_size=40)
names = st.lists(parts, min_size=1, max_size=6).map("/".join)
kinds = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, *(b"%d" % n for n in range(1, 7)), b"Q"])


@st.composite
def members(draw):
    info = tarfile.TarInfo(draw(names))
    info.type = draw(st.just(tarfile.REGTYPE) | kinds)
    info.size = draw(st.integers(0, 1500)) if info.type in (b"0", b"\0", b"7", b"Q") else 0
    info.mtime = draw(st.integers(0, 2**40) | st.floats(0, 2**31))
    info.uid = draw(st.integers(0, 2**33))
    info.linkname = draw(st.just("") | names) if info.type in b"12" else ""
    info.uname = draw(st.just("") | parts)
    if draw(st.booleans()):
        info.pax_headers = draw(st.dictionaries(st.sampled_from(["comment", "SCHILY.xattr.a"]), parts, max_size=2))
    return info


@settings(max_examples=250, deadline=None)
@given(st.lists(members(), min_size=1, max_size=6), st.sampled_from([*FORMATS.values()]), st.booleans())
def test_headers_are_those_tarfile_reads(infos, tar_format, global_header):
    buffer = io.BytesIO()
    options = {"pax_headers": {"comment": "all"}} if global_header and tar_format == tarfile.PAX_FORMAT else {}
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, **options) as tar:
        for info in infos:
            try:
                tar.addfile(info, io.BytesIO(b"\x01" * info.size))
            except (ValueError, UnicodeError):  # a name or number that ustar cannot hold
                continue
    data = buffer.getvalue()
    assert as_parser_sees(data) == as_tarfile_sees(data)


def test_names_that_are_not_utf8():
    data = bytearray(tar_bytes([("abc.jpg", b"x"), ("d.jpg", b"x")]))
    data[0:3] = b"\xff\xe9c"
    mended = checksummed(data)
    assert as_parser_sees(mended) == as_tarfile_sees(mended)
    assert [name for name, *_ in headers_of(mended)] == ["\\xff\\xe9c.jpg", "d.jpg"]


def test_sizes_in_base_256_and_in_pax():
    large = tarfile.TarInfo("large.jpg")
    large.size = 9 * 2**30
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = large.tobuf(tar_format)
        assert headers_of(data)[0][0::3] == ("large.jpg", 9 * 2**30)


@pytest.mark.parametrize("order", [lambda b: b, reversed])
def test_the_first_of_several_long_names_counts_as_in_tarfile(order):
    def extended(flag, body):
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = flag, len(body)
        return info.tobuf(tarfile.USTAR_FORMAT) + body.ljust(512, b"\0")

    extra = [extended(b"L", b"long.jpg\0"), extended(b"x", b"16 path=pax.jpg\n"), extended(b"x", b"16 path=two.jpg\n")]
    data = b"".join(order(extra)) + tar_bytes([("short.jpg", b"x")])
    assert [name for name, *_ in headers_of(data)] == [name for name, *_ in as_tarfile_sees(data)]
