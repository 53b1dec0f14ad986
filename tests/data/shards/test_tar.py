"""The samples of a tar against webdataset, the faults that must be found, and headers made to hurt the parser."""

import io
import pickle
import tarfile
import tracemalloc

import pytest

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.shards.tar import MAX_MEMBER_BYTES, read_table
from tests.data.bad_shards import (
    FORMATS,
    bad_shards,
    checksummed,
    label_png,
    not_tars,
    sample,
    special,
    tar_bytes,
    whole,
)


def table_of(data, labelled=True):
    return read_table(io.BytesIO(data), "s.tar", labelled=labelled)


def faults_of(table):
    return [(key, fault.reason) for _, key, fault in table.faults()]


def test_keys_that_are_not_utf8():
    data = bytearray(tar_bytes([("abc.jpg", b"x"), ("d.jpg", b"x")]))
    data[0:3] = b"\xff\xe9c"
    table = table_of(checksummed(data), labelled=False)
    assert table.key(0).encode() == b"\\xff\\xe9c"
    assert table.key(1) == "d"


def test_gnu_sparse_files_are_passed_over_and_refused(tmp_path):
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("hole.jpg")
        info.size = 600
        if tar_format == tarfile.GNU_FORMAT:
            info.type = tarfile.GNUTYPE_SPARSE
            head = bytearray(info.tobuf(tar_format))
            head[482] = 1  # one more block of the map
            data = checksummed(head) + bytes(512) + bytes(1024) + tar_bytes(sample("after"))
        else:
            info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9999"}
            data = info.tobuf(tar_format) + b"0\n".ljust(1024, b"\0") + tar_bytes(sample("after"))
        table = table_of(data)
        assert faults_of(table) == [("hole", "unsafe_name")]
        assert table.key(1) == "after"


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_samples_are_those_webdataset_reads(tmp_path, tar_format):
    import webdataset

    content = [
        special("folder", tarfile.DIRTYPE),
        *[(f"folder/a.b/{name}", data) for name, data in sample("one", 1)],
        ("folder/a.b/one.meta.JSON", b"{}"),
        ("__meta__/x.jpg", b"x"),
        ("README", b"no extension"),
        ("._two.jpg", b"a Macintosh's"),
        *sample("ümläut" * 10, 2),
        *[(name.upper(), data) for name, data in sample("three", 3)],
        *sample("x" * 90 + "/y", 4),
    ]
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes(content, tar_format))
    expected = list(webdataset.WebDataset(str(path), shardshuffle=False))
    with path.open("rb") as file:
        table = read_table(file, "s.tar", labelled=True)
        assert [table.key(place) for place in range(len(table))] == [sample["__key__"] for sample in expected]
        for place, there in enumerate(expected):
            assert table.read(file, place) == (there["jpg"], there["png"])
    assert not table.truncated
    assert faults_of(table) == []


def test_leading_dots_and_other_images():
    data = tar_bytes([("./a.jpg", b"j"), ("./a.png", b"p"), ("./a.webp", b"w")])
    one = table_of(data)
    assert (len(one), one.key(0), one.read(io.BytesIO(data), 0)) == (1, "a", (b"j", b"p"))
    data = tar_bytes([("a.webp", b"w"), ("a.png", b"p"), ("b.png", b"q"), ("c.jpeg", b"j"), ("c.cls", b"3")])
    unlabelled = table_of(data, labelled=False)
    assert [unlabelled.read(io.BytesIO(data), place) for place in range(3)] == [
        (b"w", None),
        (b"q", None),
        (b"j", None),
    ]


@pytest.mark.parametrize("name", bad_shards())
def test_every_fault_is_found_and_the_rest_still_read(name):
    case = bad_shards()[name]
    table = table_of(case.data, case.labelled)
    assert faults_of(table) == list(case.faults)
    bad = {place for place, _, _ in table.faults()}
    for place in range(len(table)):
        if place in bad:
            with pytest.raises(BadSample, match=r"^s\.tar: sample '[^\n]+': [^\n]+$"):
                table.read(io.BytesIO(case.data), place)
        else:
            image, label = table.read(io.BytesIO(case.data), place)
            assert image
            assert bool(label) == case.labelled
    good = [table.key(place) for place in range(len(table)) if place not in bad]
    assert good == [*case.good, *(key for key, _ in case.deep_faults)]


@pytest.mark.parametrize("name", not_tars())
def test_what_is_no_tar(name):
    with pytest.raises(BadSample, match=r"^s\.tar: [^\n]+$") as error:
        table_of(not_tars()[name])
    assert error.value.reason == "shard_unreadable"


def test_a_tar_cut_anywhere_keeps_the_samples_before_the_cut():
    data = whole(4)
    full = table_of(data)
    ends = [int(spans[2] + spans[3]) for spans in full._spans]
    for cut in range(512, len(data), 97):
        table = table_of(data[:cut])
        bad = {place for place, _, _ in table.faults()}
        # A key whose first header is cut is not known.
        assert sum(place not in bad for place in range(len(table))) == sum(end <= cut for end in ends)
        assert {reason for _, reason in faults_of(table)} <= {"truncated"}
        assert table.truncated == (cut < ends[-1] + 512 + (-ends[-1]) % 512), cut


def test_a_damaged_header_is_told_and_costs_what_comes_after():
    data = bytearray(whole(3))
    offset = int(table_of(data)._spans[1][0])
    data[offset - 400] ^= 1
    table = table_of(data)
    assert len(table) == 1
    assert table.truncated
    assert f"byte {offset - 512} is damaged" in table.damage


def test_metadata_of_the_shard_is_no_sample():
    assert len(table_of(tar_bytes([("__meta__.json", b"{}"), ("./__index__/a.jpg", b""), ("__x__", b"")]))) == 0


def test_an_empty_tar_and_one_of_zeros():
    assert len(table_of(tar_bytes([]))) == 0
    assert not table_of(bytes(4096)).truncated


def test_pickled_members_beside_what_is_needed_are_left_alone():
    data = tar_bytes([*sample("a"), ("a.pkl", b"x")])
    assert faults_of(table_of(data)) == []


def test_pieces_of_unequal_kind_are_all_bad_and_repeats_only_the_later():
    x, y = ("x.jpg", b"1"), ("y.jpg", b"1")
    data = tar_bytes([x, y, ("x.txt", b"1"), ("z.jpg", b"1"), x])
    assert faults_of(table_of(data, labelled=False)) == [
        ("x", "interleaved_keys"),
        ("x", "interleaved_keys"),
        ("x", "duplicate_key"),
    ]


def header(name=b"a.jpg", size=b"00000000001\0", flag=b"0"):
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = size
    block[156:157] = flag
    return checksummed(block)


HOSTILE = {
    "negative base-256 size": header(size=b"\xff" * 12),
    "negative octal size": header(size=b"-0000000777\0"),
    "size beyond 64 bits": header(size=b"\x80" + b"\xff" * 11),
    "size beyond the file": header(size=b"77777777777\0"),
    "long name beyond the file": header(flag=b"L", size=b"77777777777\0"),
    "long name of 2 MiB": header(flag=b"L", size=b"00010000000\0") + b"a" * 2**21,
    "long name of 5 kB": header(flag=b"L", size=b"00000012000\0") + b"a" * 5120 + header(),
    "pax beyond the file": header(flag=b"x", size=b"77777777777\0"),
    "pax that is none": header(flag=b"x", size=b"00000001000\0") + b"path=\xff".ljust(512, b"=") + header(),
    "pax size of many digits": header(flag=b"x", size=b"00000013000\0")
    + (b"5632 size=" + b"9" * 5621 + b"\n")
    + header(),
    "negative pax size": header(flag=b"x", size=b"00000000013\0") + b"11 size=-9\n".ljust(512, b"\0") + header(),
    "pax record of no length": header(flag=b"x", size=b"00000000007\0") + b"0 path=".ljust(512, b"\0") + header(),
    "pax without end": header(flag=b"x", size=b"00000000014\0") + b"99 path=abc\n".ljust(512, b"\0") + header(),
    "pax with nothing behind": header(flag=b"x", size=b"00000000014\0") + b"12 path=abc\n".ljust(512, b"\0"),
    "a chain of pax headers": header(flag=b"x", size=b"00000000000\0") * 5000,
    "a chain of long names": header(flag=b"L", size=b"00000000000\0") * 5000,
    "sparse map without end": checksummed(header(flag=b"S")[:482] + b"\1" * 30) + b"\1" * 512 * 50,
    "nothing but headers": header(size=b"00000000000\0") * 5000,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("labelled", [True, False])
def test_hostile_headers_end_in_faults(name, labelled):
    data = tar_bytes(sample("good", labelled=labelled), end=False) + HOSTILE[name] + bytes(1024)
    tracemalloc.start()
    table = table_of(data, labelled)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * len(data) + 2**20
    assert table.read(io.BytesIO(data), 0)[0]
    assert len(list(table.faults())) >= len(table) - 1
    table_of(HOSTILE[name], labelled)


def test_a_huge_member_of_a_sparse_file_is_not_read(tmp_path):
    path = tmp_path / "holes.tar"
    size = MAX_MEMBER_BYTES + 1
    with path.open("wb") as file:
        file.write(header(size=b"%011o\0" % size))
        file.truncate(512 + size)
    with path.open("rb") as file:
        table = read_table(file, "s.tar", labelled=False)
        with pytest.raises(BadSample) as error:
            table.read(file, 0)
    assert error.value.reason == "too_large"


def test_a_file_that_shrinks_or_fails_while_it_is_read():
    data = whole(1)

    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")

    table = table_of(data)
    for file, reason in ((io.BytesIO(data[:700]), "truncated"), (Broken(data), "shard_unreadable")):
        with pytest.raises(BadSample) as error:
            table.read(file, 0)
        assert error.value.reason == reason
    with pytest.raises(BadSample) as error:
        read_table(Broken(data), "s.tar", labelled=True)
    assert error.value.reason == "shard_unreadable"


def test_bodies_are_skipped_and_short_reads_continued():
    class Counting(io.BytesIO):
        count = 0

        def read(self, size=-1):
            data = super().read(min(size, 3000))
            Counting.count += len(data)
            return data

    data = tar_bytes([(f"{n}.jpg", bytes(100_000)) for n in range(20)])
    file = Counting(data)
    table = read_table(file, "s.tar", labelled=False)
    assert Counting.count < 25 * 4096
    assert table.read(file, 7) == (bytes(100_000), None)


def test_a_table_is_small_and_travels_by_pickle():
    data = tar_bytes(member for n in range(500) for member in ((f"{n:09d}.jpg", b"x"), (f"{n:09d}.png", b"y")))
    table = table_of(data)
    pickled = pickle.dumps(table)
    assert len(pickled) < 500 * 60
    assert pickle.loads(pickled).key(499) == "000000499"


def test_label_pngs_are_what_the_label_span_holds():
    data = whole(2)
    assert table_of(data).read(io.BytesIO(data), 1)[1] == label_png(1)
