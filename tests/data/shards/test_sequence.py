"""Shards read in sequence through webdataset have the samples and faults that their tables have."""

import io
import random
import tarfile

import pytest
import webdataset

from maskmatch_scale.data.faults import BadSample, NotFetched
from maskmatch_scale.data.shards import sequence
from maskmatch_scale.data.shards.sequence import read_in_sequence
from maskmatch_scale.data.shards.tar import read_table
from tests.data import bad_shards
from tests.data.shards.test_fuzz import mutated


class Pieces:
    """A stream that gives no more than a few bytes at once, and fails after some of them."""

    def __init__(self, data, most=1 << 20, fails=None):
        self.file, self.most, self.fails = io.BytesIO(data), most, fails

    def read(self, size):
        if self.fails is not None and self.file.tell() >= self.fails:
            raise NotFetched("the network is gone", may_pass=True)
        return self.file.read(min(size, self.most))

    def close(self):
        pass


def by_table(data):
    """(key, image or reason) of each sample, by its table."""
    file = io.BytesIO(data)
    table = read_table(file, "x.tar", labelled=False)
    return [
        (table.key(n), fault.reason if (fault := table.fault(n)) else table.read(file, n)[0]) for n in range(len(table))
    ]


def in_sequence(data, **how):
    return [
        (found.key, found.sample.reason if isinstance(found.sample, BadSample) else found.sample.image)
        for found in read_in_sequence(Pieces(data, **how), "x.tar")
    ]


def refusal(read, data):
    """What a reader says of data that it does not read."""
    try:
        read(data)
    except BadSample as bad:
        return str(bad)
    return None


def same(table, sequence):
    """Whether both are the same, but for what a sequence cannot know yet."""
    if sequence and sequence[-1] == (None, "truncated"):
        sequence = sequence[:-1]
    # What claims more bytes than any image may have is refused, before its tar turns out to end earlier.
    either = ({"truncated", "too_large"}, {"interleaved_keys", "no_image"})
    return len(table) == len(sequence) and all(
        one == other or (one[0] == other[0] and (one[1] == "interleaved_keys" or {one[1], other[1]} in either))
        for one, other in zip(table, sequence, strict=True)
    )


@pytest.mark.parametrize("tar_format", bad_shards.FORMATS)
@pytest.mark.parametrize("most", [1, 700, 1 << 20])
def test_all_formats_and_blocks_of_any_size(tar_format, most):
    names = ["a.jpg", "a.json", "./b.JPG", "c.d/e.webp", f"{'long/' * 40}f.png", "gä.jpeg", "__key__/h.jpg", "noext"]
    members = [(name, name.encode() * 400) for name in names]
    data = bad_shards.tar_bytes(members, bad_shards.FORMATS[tar_format])
    assert in_sequence(data, most=most) == by_table(data)
    assert [key for key, _ in by_table(data)] == ["a", "b", "c.d/e", f"{'long/' * 40}f", "gä"]


@pytest.mark.parametrize("name", bad_shards.bad_shards())
def test_every_fault_that_has_a_name(name):
    data = bad_shards.bad_shards()[name].data
    assert same(by_table(data), in_sequence(data))


@pytest.mark.parametrize("name", bad_shards.not_tars())
def test_files_that_are_no_tars(name):
    data = bad_shards.not_tars()[name]
    with pytest.raises(BadSample) as by_its_table:
        by_table(data)
    with pytest.raises(BadSample) as one_after_the_other:
        in_sequence(data)
    assert str(by_its_table.value) == str(one_after_the_other.value)


def test_a_tar_without_samples_is_refused():
    with pytest.raises(BadSample, match="holds no sample"):
        in_sequence(bad_shards.tar_bytes([("README", b"x")]))


def test_damaged_shards():
    """Nothing but a BadSample is ever raised, and nothing is read that a table refuses."""
    shards = [(bad_shards.whole(4, labelled=False), False), (bad_shards.bad_shards()["pickled image"].data, False)]
    shards += [
        (bad_shards.tar_bytes(bad_shards.sample("x/" * 60 + "a", labelled=False), kind), False)
        for kind in bad_shards.FORMATS.values()
    ]
    compared = 0
    for number in range(1500):
        data, _ = mutated(number, shards)
        refused = refusal(by_table, data)
        if refused is not None:
            assert refusal(in_sequence, data) == refused, number
            continue
        table = by_table(data)
        if not table:
            continue
        sequence = in_sequence(data, most=random.Random(number).choice([100, 5000, 1 << 20]))
        assert same(table, sequence), (number, table, sequence)
        compared += 1
    assert compared > 500


def test_webdataset_sees_only_what_it_may(monkeypatch):
    """Neither links nor sparse files nor members beyond the bound, whatever their headers claim."""
    seen = []
    extract = tarfile.TarFile.extractfile
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda tar, member: seen.append(member.name) or extract(tar, member)
    )
    monkeypatch.setattr("maskmatch_scale.data.shards.sequence.MAX_MEMBER_BYTES", 5000)
    sparse = bad_shards.special("s.jpg", b"S")
    sparse.size = 0
    members = [("a.jpg", b"x" * 4000), ("b.jpg", b"x" * 6000), bad_shards.special("l.jpg", b"2", "a.jpg"), sparse]
    list(read_in_sequence(Pieces(bad_shards.tar_bytes([*members, ("../c.jpg", b"y"), ("d", b"z")])), "x.tar"))
    assert seen == ["a.jpg"]


def test_a_name_that_begins_like_a_compressed_file():
    members = [("BZh91AY&SY.jpg", b"x" * 4000), ("\x1f\x8b\x08.jpg", b"y"), ("z.jpg", b"z")]
    data = bad_shards.tar_bytes(members)
    assert in_sequence(data) == by_table(data) == [(name.removesuffix(".jpg"), image) for name, image in members]


def test_webdataset_is_not_told_secrets(monkeypatch):
    """What it raises has the address, and becomes a message."""

    def fails(tar, member):
        raise tarfile.ReadError("no")

    monkeypatch.setattr(tarfile.TarFile, "next", fails)
    pipe = "pipe:curl -H 'X-Token: hush' http://host/x.tar"
    (found,) = list(read_in_sequence(Pieces(bad_shards.whole(1, labelled=False)), pipe))
    assert "webdataset cannot read on" in str(found.sample)
    assert "hush" not in str(found.sample)


def test_what_the_stream_raises_comes_through_and_what_was_whole_before():
    data = bad_shards.whole(6, labelled=False)
    found = []
    with pytest.raises(NotFetched, match=r"^the network is gone$"):  # noqa: PT012 - what came before counts
        for one in read_in_sequence(Pieces(data, most=512, fails=len(data) // 2), "x.tar"):
            found.append(one.key)
    assert found == ["s0", "s1"][: len(found)] != []


def test_shards_of_webdataset_writers(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for number in range(3):
            image = bad_shards.jpeg(number)
            writer.write({"__key__": f"k{number}", "jpg": image, "json": {"a": 1}, "txt": "x", "cls": 3})
    data = (tmp_path / "w.tar").read_bytes()
    assert in_sequence(data) == by_table(data)
    assert [key for key, _ in in_sequence(data)] == ["k0", "k1", "k2"]


@pytest.mark.parametrize(
    "name", ["a.jpg", "x/y.z.webp", "é" * 50, "k" * 96 + ".jpg", "k" * 97 + ".jpg", "f/" * 90 + "a.png"]
)
def test_headers_are_those_that_tarfile_writes(name):
    header = tarfile.TarInfo(name)
    header.size = sequence._DIGITS
    assert sequence._header(name) == header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def test_an_image_is_held_no_longer_than_its_sample(monkeypatch):
    """And the sieve is no more than one image ahead of what was given."""
    made = []
    make = sequence._Sieve.__init__

    def noted(self, *of, **more):
        made.append(self)
        make(self, *of, **more)

    monkeypatch.setattr(sequence._Sieve, "__init__", noted)
    data = bad_shards.tar_bytes(
        [(f"{n:02d}.{kind}", b"%d" % n) for n in range(20) for kind in ("jpg", "png", "jpg")[: 1 + n % 3]]
    )
    held = [len(made[0]._bodies) for _ in sequence.read_in_sequence(Pieces(data), "x.tar")]
    assert len(held) == 20
    assert max(held) <= 3
