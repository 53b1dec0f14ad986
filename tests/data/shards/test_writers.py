"""Archives of other writers are read alike, and ours by webdataset's reader."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.shards.sequence import read_in_sequence
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.data.writing import EncodedSample, StreamItems, write_shards

NAME = st.text("abcXYZ012 -äé", min_size=1, max_size=12).filter(lambda name: name == name.strip())
KEY = st.one_of(NAME, st.tuples(NAME, NAME).map("/".join), NAME.map(lambda name: "/".join([name[:8]] * 9)))
FOLDER = st.one_of(NAME, st.tuples(NAME, NAME).map(".".join))
ODD_KEY = st.one_of(
    NAME,
    st.tuples(FOLDER, FOLDER, NAME).map("/".join),  # dots in folders are none of the key's end
    NAME.map(lambda name: "/".join([(name * 12)[:12]] * 6)),  # longer than the field of a header
)
MEMBERS = st.tuples(
    st.one_of(st.none(), st.tuples(st.sampled_from(["jpg", "JPG", "jpeg", "webp", "png"]), st.binary(max_size=900))),
    st.dictionaries(st.sampled_from(["json", "txt", "cls", "seg.png", "0.jpg", "npy"]), st.binary(max_size=50)),
)
"""The image of a sample, which may be missing or empty, and what else it has."""


@st.composite
def odd_samples(draw):
    """By key, the members of samples in any order."""
    found = {}
    for key, (image, others) in draw(st.dictionaries(ODD_KEY, MEMBERS, min_size=1, max_size=5)).items():
        members = [*others.items(), *([image] if image else [])] or [("txt", b"alone")]
        found[key] = dict(draw(st.permutations(members)))
    return found


SAMPLES = st.dictionaries(
    KEY, st.tuples(st.binary(min_size=1, max_size=1500), st.booleans()), min_size=1, max_size=5
).map(
    lambda samples: {key: {"jpg": image, **({"json": b"{}"} if more else {})} for key, (image, more) in samples.items()}
)


def by_tar_writer(samples, folder):
    path = folder / "s.tar"
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for key, members in samples.items():
            tar.write({"__key__": key, **members})
    return [path]


def by_shard_writer(samples, folder):
    with webdataset.ShardWriter(str(folder / "s-%06d.tar"), maxcount=2, encoder=False, verbose=0) as tar:
        for key, members in samples.items():
            tar.write({"__key__": key, **members})
    return sorted(folder.glob("s-*.tar"))


def by_program(*command):
    def write(samples, folder):
        names = []
        for key, members in samples.items():
            for extension, data in members.items():
                path = folder / "files" / f"{key}.{extension}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                names.append(f"./{path.relative_to(folder / 'files')}")
        listed = "".join(f"{name}\n" for name in names).encode()
        subprocess.run([*command, "-cf", "../s.tar", "-T", "-"], cwd=folder / "files", input=listed, check=True)
        return [folder / "s.tar"]

    return write


WRITERS = {
    "TarWriter": by_tar_writer,
    "ShardWriter": by_shard_writer,
    **{f"GNU tar, {kind}": by_program("tar", f"--format={kind}") for kind in ("gnu", "pax", "ustar")},
    "bsdtar": by_program("bsdtar"),
}


@pytest.mark.parametrize("writer", WRITERS)
@given(samples=SAMPLES)
@settings(max_examples=15, deadline=None)
def test_every_writer_is_read_alike(writer, samples):
    if writer == "bsdtar" and not shutil.which("bsdtar"):
        pytest.skip("bsdtar is not installed")
    with tempfile.TemporaryDirectory() as name:
        paths = WRITERS[writer](samples, Path(name))
        read = {}
        for path in paths:
            with path.open("rb") as file:
                table = read_table(file, "s.tar", labelled=False)
                assert not table.truncated
                read |= {table.key(place): table.read(file, place)[0] for place in range(len(table))}
        theirs = list(webdataset.WebDataset(list(map(str, paths)), shardshuffle=False, empty_check=False))
    assert list(read) == list(samples)
    assert [sample["__key__"].removeprefix("./") for sample in theirs] == list(read)
    assert list(read.values()) == [members["jpg"] for members in samples.values()]


@pytest.mark.parametrize("writer", WRITERS)
@given(samples=odd_samples())
@settings(max_examples=15, deadline=None)
def test_odd_samples_are_read_alike(writer, samples):
    """By table, in sequence and by webdataset: the same keys, images and faults."""
    if writer == "bsdtar" and not shutil.which("bsdtar"):
        pytest.skip("bsdtar is not installed")
    with tempfile.TemporaryDirectory() as name:
        paths = WRITERS[writer](samples, Path(name))
        by_table, in_sequence = [], []
        for path in paths:
            with path.open("rb") as file:
                table = read_table(file, path.name, labelled=False)
                for place in range(len(table)):
                    fault = table.fault(place)
                    by_table.append((table.key(place), str(fault) if fault else table.read(file, place)[0]))
            with path.open("rb") as file:
                for found in read_in_sequence(file, path.name):
                    bad = isinstance(found.sample, BadSample)
                    in_sequence.append((found.key, str(found.sample) if bad else found.sample.image))
        theirs = list(webdataset.WebDataset(list(map(str, paths)), shardshuffle=False, empty_check=False))
    assert [key for key, _ in by_table] == list(samples)
    assert in_sequence == by_table
    assert [sample["__key__"].removeprefix("./") for sample in theirs] == list(samples)
    for (_, ours), sample, members in zip(by_table, theirs, samples.values(), strict=True):
        assert {ext: sample[ext] for ext in sample if not ext.startswith("__")} == {
            ext.lower(): data for ext, data in members.items()
        }
        image = next((sample[ext] for ext in ("jpg", "jpeg", "webp", "png") if ext in sample), None)
        if image:
            assert ours == image
        else:
            assert ("no image member" if image is None else "its image has no bytes") in ours


@pytest.mark.parametrize("writer", [name for name in WRITERS if "ustar" not in name])
def test_names_longer_than_any_field(writer, tmp_path):
    if writer == "bsdtar" and not shutil.which("bsdtar"):
        pytest.skip("bsdtar is not installed")
    samples = {"/".join([f"{'é' * 10}{number}"] * 40): {"jpg": b"%d" % number} for number in range(3)}
    found = []
    for path in WRITERS[writer](samples, tmp_path):
        with path.open("rb") as file:
            table = read_table(file, path.name, labelled=False)
            found += [(table.key(place), table.read(file, place)[0]) for place in range(len(table))]
        with path.open("rb") as file:
            assert [each.key for each in read_in_sequence(file, path.name)] == [table.key(n) for n in range(len(table))]
    assert found == [(key, members["jpg"]) for key, members in samples.items()]


class _Given:
    """A data source of samples that are given."""

    name, classes, palette, ignore_index, settings = "given", (), (), 255, {}

    def __init__(self, samples):
        self.streams = {"unlabelled": StreamItems(False, samples)}

    @staticmethod
    def render(item):
        key, image, extension = item
        return EncodedSample(key, image, extension)


@given(
    samples=st.lists(
        st.tuples(NAME, st.binary(min_size=1, max_size=900), st.sampled_from(["jpg", "webp", "png"])),
        min_size=1,
        max_size=6,
        unique_by=lambda sample: sample[0],
    )
)
@settings(max_examples=15, deadline=None)
def test_ours_are_read_by_webdataset(samples):
    with tempfile.TemporaryDirectory() as name:
        write_shards(_Given(samples), name, workers=1, progress=False)
        files = [str(Path(name) / shard.file) for shard in ShardIndex.load(name).streams["unlabelled"].shards]
        theirs = list(webdataset.WebDataset(files, shardshuffle=False))
        ours = [ShardStream(name, "unlabelled")[number] for number in range(len(samples))]
    assert [(sample["__key__"], sample[ext]) for sample, (_, _, ext) in zip(theirs, samples, strict=True)] == [
        (raw.key, raw.image) for raw in ours
    ]
    assert sorted(raw.key for raw in ours) == sorted(key for key, _, _ in samples)
