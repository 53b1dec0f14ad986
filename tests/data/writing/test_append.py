"""Samples that a source has got since its folder was written, in new shards."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.offsets import is_side_car_of, side_car
from maskmatch_scale.data.tools.verify import verify
from maskmatch_scale.data.writing import Appended, append_shards, merge_shards, write_shards
from maskmatch_scale.data.writing import shard as shard_module
from maskmatch_scale.data.writing.parts import Part
from maskmatch_scale.data.writing.sources.image_folder import image_folder
from maskmatch_scale.data.writing.sources.image_list import image_list
from maskmatch_scale.data.writing.sources.options import Options
from tests.data.writing.squares import Squares, contents, keys


class Photos:
    """Small photos below `source`, most of them with label maps, and their shard folder `out`."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.source, self.out, self.names = folder / "source", folder / "out", folder / "names.txt"
        self.names.write_text("ground\ncrack\n")
        self.options = {"classes": str(self.names), **options}

    def add(self, *names: str, label: bool = True, same_as: str | None = None) -> None:
        for name in names:
            path = self.source / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if same_as is not None:
                shutil.copy(self.source / "images" / same_as, path)
            else:
                draw = np.random.default_rng(list(name.encode()))
                Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
            if label:
                self.label(name)

    def label(self, name: str) -> None:
        path = (self.source / "labels" / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ones((8, 8), dtype=np.uint8)).save(path)

    def listed(self, **options: object):
        return image_folder(self.source, Options(**{**self.options, **options}))

    def write(self, **options: object) -> ShardIndex:
        return write_shards(self.listed(), self.out, workers=1, progress=False, **options)

    def append(self, **options: object) -> Appended:
        return append_shards(self.listed(), self.out, workers=1, progress=False, **options)

    def streams(self) -> dict[str, str]:
        """The stream of each key; every shard is checked."""
        assert [str(fault) for fault in verify(self.out)] == []
        index = ShardIndex.load(self.out)
        for stream in index.streams.values():
            assert stream.class_pixels == ((0, 64 * stream.samples, 0) if stream.labelled else None)
            for shard in stream.shards:
                assert is_side_car_of(self.out / side_car(shard.file), shard.sha256 or "")
        found = [(key, name) for name in index.streams for key in keys(self.out, name)]
        assert len(dict(found)) == len(found)
        return dict(found)


def numbered(start: int, stop: int, ending: str = ".jpg") -> list[str]:
    return [f"{number:03d}{ending}" for number in range(start, stop)]


def test_new_images_are_in_new_shards(tmp_path: Path) -> None:
    photos = Photos(tmp_path, dev="0.2")
    photos.add(*numbered(0, 20))
    photos.add(*numbered(100, 110), label=False)
    photos.write()
    before, then = contents(photos.out), photos.streams()
    photos.add(*numbered(20, 50), *numbered(50, 52, ".webp"))
    photos.add("night/1.jpg", label=False)
    appended = photos.append()
    now = photos.streams()
    assert then.items() <= now.items()
    assert len(now) == 63
    assert appended.samples["dev"] > 0
    assert sum(appended.samples.values()) == 33
    after = contents(photos.out)
    assert all(after[name] == data for name, data in before.items() if name.endswith((".tar", ".offsets")))
    new = sorted(name for name in after.keys() - before.keys() if name.endswith(".tar"))
    assert [name for name in new if name.startswith("unlabelled")] == ["unlabelled-000008.tar"]
    assert appended.index == ShardIndex.load(photos.out)
    assert not [name for name in after if name.startswith(".")]
    assert photos.append().samples == {}
    assert contents(photos.out) == after
    photos.add("later.jpg")
    photos.append()
    history = ShardIndex.load(photos.out).settings["appended"]
    assert [text.partition(" ")[0] for text in history] == ["30", "63"]
    with pytest.raises(DataError, match=r"with appended=.*--append appends again"):
        photos.write()
    with pytest.raises(DataError, match="--overwrite does not delete them"):
        photos.write(overwrite=True)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.sets(st.integers(0, 25), min_size=3, max_size=12),
    second=st.sets(st.integers(0, 25), max_size=12),
    lost=st.sets(st.integers(0, 25), max_size=3),
    dev=st.sampled_from(["2", "0.3"]),
)
def test_every_image_is_there_once_and_in_the_stream_of_then(tmp_path_factory, first, second, lost, dev) -> None:
    photos = Photos(tmp_path_factory.mktemp("photos"), dev=dev)
    photos.add(*(f"{number}.jpg" for number in first))
    photos.write()
    then = photos.streams()
    photos.add(*(f"{number}.jpg" for number in second - first))
    for number in lost & first if len(first - lost) > 2 else ():
        (photos.source / "images" / f"{number}.jpg").unlink()
        (photos.source / "labels" / f"{number}.png").unlink()
    photos.append()
    now = photos.streams()
    assert then.items() <= now.items()
    assert now.keys() == {str(number) for number in first | second}


def test_samples_stay_where_they_are_and_it_is_said(tmp_path: Path) -> None:
    photos = Photos(tmp_path)
    photos.add(*numbered(0, 9))
    photos.add("bare.jpg", label=False)
    photos.write()
    photos.label("bare.jpg")
    (photos.source / "images" / "000.jpg").unlink()
    (photos.source / "labels" / "000.png").unlink()
    appended = photos.append()
    assert appended.samples == {}
    lost, moved = appended.notes
    assert lost.startswith("1 samples of the folder have no file")
    assert "such as images/bare.jpg (labelled, not unlabelled); they stay" in moved
    assert photos.streams()["bare"] == "unlabelled"
    assert photos.append().notes == ()


def test_files_that_were_changed_are_counted(tmp_path: Path) -> None:
    photos = Photos(tmp_path)
    photos.add(*numbered(0, 9))
    photos.write()
    later = (photos.out / "index.json").stat().st_mtime_ns + 10**9
    for path in ("images/001.jpg", "labels/001.png", "labels/004.png"):
        os.utime(photos.source / path, ns=(later, later))
    photos.add("new.jpg")
    os.utime(photos.source / "images" / "new.jpg", ns=(later, later))
    (note,) = photos.append().notes
    assert note.startswith("2 samples of the folder have files that were changed after")
    assert "such as images/001.jpg; they stay" in note


@pytest.mark.parametrize("ending", [".jpg", ".webp", ".png"])
def test_other_images_of_the_same_names_are_counted(tmp_path: Path, ending: str) -> None:
    """Their times may be those of the photographs."""
    photos = Photos(tmp_path)
    photos.add(*numbered(0, 9, ending), label=ending != ".png")
    photos.add("labelled.png", "grey.jpg")
    Image.new("L", (8, 8)).save(photos.source / "images" / "grey.jpg", "BMP")  # stored otherwise, like labelled PNGs
    photos.write()
    for name in numbered(2, 4, ending):
        path = photos.source / "images" / name
        Image.new("RGB", (9, 9)).save(path)
        os.utime(path, (10**9, 10**9))
    photos.add("new" + ending)
    (note,) = photos.append().notes
    assert note.startswith(
        f"2 samples of the folder have the name of another image of the source, such as images/002{ending}"
    )


def test_duplicates_of_images_that_are_there(tmp_path: Path) -> None:
    photos = Photos(tmp_path, val="2")
    photos.add(*numbered(0, 9))
    photos.add("copy.jpg", same_as="003.jpg", label=False)
    photos.write()
    (held_out,) = [key for key, stream in photos.streams().items() if stream == "val"][:1]
    photos.add("again.jpg", same_as=f"{held_out}.jpg", label=False)
    photos.add("new.jpg", label=False)
    photos.add("new2.jpg", same_as="new.jpg", label=False)
    assert photos.append().samples == {"unlabelled": 1}
    lines = [json.loads(line) for line in (photos.out / "duplicates.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == ["images/copy.jpg", "images/again.jpg", "images/new2.jpg"]
    assert lines[1]["same_as"] == {"stream": "val", "image": f"images/{held_out}.jpg"}
    assert not {"copy", "again", "new2"} & photos.streams().keys()
    photos.add("last.jpg")
    photos.append()
    assert not {"copy", "again", "new2"} & photos.streams().keys()


def test_a_duplicate_of_an_image_that_was_never_written_is_none(tmp_path: Path) -> None:
    photos = Photos(tmp_path)
    photos.add(*numbered(0, 9))
    photos.write()
    photos.add("new.jpg")
    (photos.source / "labels" / "new.png").write_bytes(b"rubbish")
    photos.add("same.jpg", same_as="new.jpg", label=False)
    with pytest.raises(BadSample, match=r"new\.png"):
        photos.append()
    (photos.source / "images" / "new.jpg").unlink()
    (photos.source / "labels" / "new.png").unlink()
    assert photos.append().samples == {"unlabelled": 1}
    assert photos.streams()["same"] == "unlabelled"
    assert (photos.out / "duplicates.jsonl").read_bytes() == b""


def test_bad_samples_are_tried_again(tmp_path: Path) -> None:
    photos = Photos(tmp_path)
    photos.add(*numbered(0, 9))
    good = (photos.source / "images" / "004.jpg").read_bytes()
    for name in ("004.jpg", "005.jpg"):
        (photos.source / "images" / name).write_bytes(b"rubbish " + name.encode())
    photos.write(skip_bad=True)
    before = contents(photos.out)
    assert photos.append(skip_bad=True).samples == {"labelled": 0}
    rewritten = contents(photos.out)
    assert rewritten.pop("skipped.jsonl") != before.pop("skipped.jsonl")  # with the names of the shards of now
    assert rewritten == before
    (photos.source / "images" / "004.jpg").write_bytes(good)
    with pytest.raises(BadSample, match=r"005\.jpg.*--skip-bad"):
        photos.append()
    assert photos.append(skip_bad=True).samples == {"labelled": 1}
    lines = [json.loads(line) for line in (photos.out / "skipped.jsonl").read_text().splitlines()]
    assert ["005.jpg" in line["message"] for line in lines] == [True]
    assert len(photos.streams()) == 8


def _append_and_die(photos: Photos, at: int) -> None:
    """`at`: the shard within which this process is killed."""
    plain = shard_module.write_side_car
    count = []

    def write_side_car(*arguments: object, **options: object) -> None:
        count.append(1)
        if len(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(*arguments, **options)

    shard_module.write_side_car = write_side_car
    photos.append(samples_per_shard=2)


def killed(photos: Photos, at: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_append_and_die, args=(photos, at))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_append_goes_on(tmp_path: Path) -> None:
    photos = Photos(tmp_path, dev="2")
    photos.add(*numbered(0, 9))
    photos.write(samples_per_shard=2)
    photos.add(*numbered(20, 40))
    photos.add("copy.jpg", same_as="020.jpg")
    shutil.copytree(photos.out, tmp_path / "plain")
    killed(photos, 4)
    index = ShardIndex.load(photos.out)  # of then: training can go on
    assert "appended" not in index.settings
    assert list(verify(photos.out)) == []
    assert (photos.out / ".written.jsonl").is_file()
    done = {path.name: path.stat().st_mtime_ns for path in photos.out.glob("[!.]*.tar")}
    photos.append(samples_per_shard=2)
    assert all((photos.out / name).stat().st_mtime_ns == time for name, time in done.items())
    append_shards(photos.listed(), tmp_path / "plain", workers=1, progress=False, samples_per_shard=2)
    assert contents(photos.out) == contents(tmp_path / "plain")


def test_an_append_that_was_begun_with_other_files(tmp_path: Path) -> None:
    photos = Photos(tmp_path)
    photos.add(*numbered(0, 9))
    photos.write(samples_per_shard=2)
    then = photos.streams()
    photos.add(*numbered(20, 30))
    killed(photos, 3)
    photos.add(*numbered(30, 35))
    with pytest.raises(DataError, match=r"was begun \(19 samples.*; now 24 samples.*--append --overwrite"):
        photos.append(samples_per_shard=2)
    photos.append(samples_per_shard=2, overwrite=True)
    assert then.items() <= photos.streams().items()
    assert len(photos.streams()) == 24
    assert not (photos.out / ".written.jsonl").exists()


def test_what_cannot_be_appended(tmp_path: Path) -> None:
    photos = Photos(tmp_path)
    photos.add(*numbered(0, 9))
    with pytest.raises(DataError, match="nothing to append to; write it without --append first"):
        photos.append()
    photos.write()
    photos.add("new.jpg")
    with pytest.raises(DataError, match="--append writes only the images that are new"):
        photos.write()
    with pytest.raises(DataError, match="samples_per_shard=256, but samples_per_shard=2 is asked"):
        photos.append(samples_per_shard=2)
    photos.options["max_side"] = 4
    with pytest.raises(DataError, match="max_side=None, but max_side=4 is asked"):
        photos.append()
    photos.options["max_side"] = None
    photos.names.write_text("ground\nplant\n")
    with pytest.raises(DataError, match=r"class_names=.* is asked"):
        photos.append()
    photos.names.write_text("ground\ncrack\n")
    shard = photos.out / "labelled-000000.tar"
    (photos.out / "labelled-000008.tar").write_bytes(b"theirs")
    for _ in range(2):
        with pytest.raises(DataError, match=r"labelled-000008\.tar: exists, but"):
            photos.append()
    assert (photos.out / "labelled-000008.tar").read_bytes() == b"theirs"
    shard.rename(photos.out / "labelled-000008.tar")
    with pytest.raises(DataError, match=r"a shard that index\.json names is not there"):
        photos.append()
    write_shards(Squares(), tmp_path / "squares", workers=1, progress=False)
    with pytest.raises(DataError, match=r"source squares cannot tell new samples; .*shards merge"):
        append_shards(Squares(unlabelled=30), tmp_path / "squares", workers=1, progress=False)
    write_shards(photos.listed(), tmp_path / "part", workers=1, progress=False, part=Part(1, 2))
    with pytest.raises(DataError, match="part: only part 1/2 of a data set; merge"):
        append_shards(photos.listed(), tmp_path / "part", workers=1, progress=False)


def test_keys_that_collide_later(tmp_path: Path) -> None:
    photos = Photos(tmp_path)
    photos.add(*numbered(0, 9), "a.b.jpg")
    photos.write()
    photos.add("a_b.jpg")
    with pytest.raises(DataError, match=r"several images have the key 'a_b' now"):
        photos.append()
    (photos.source / "images" / "a_b.jpg").unlink()
    photos.add("c.d.jpg", "c_d.jpg")
    photos.append()
    (photos.source / "images" / "c_d.jpg").unlink()  # then the other one has no hash in its key
    (photos.source / "labels" / "c_d.png").unlink()
    photos.add("new.jpg")
    assert photos.append().samples == {"labelled": 1}
    assert len(photos.streams()) == 13


def test_equal_keys_in_two_streams_are_two_images(tmp_path: Path) -> None:
    photos = Photos(tmp_path)
    photos.add("a.jpg", "a.webp", "b.jpg", "b.webp", label=False)
    rows = ["image,stream", "a.jpg,one", "b.jpg,one"]

    def listed():
        (tmp_path / "list.csv").write_text("\n".join(rows))
        return image_list(tmp_path / "list.csv", Options(), root=photos.source / "images")

    write_shards(listed(), photos.out, workers=1, progress=False)
    rows += ["a.webp,two", "b.webp,two"]
    appended = append_shards(listed(), photos.out, workers=1, progress=False)
    assert (appended.samples, appended.notes) == ({"two": 2}, ())


def test_an_appended_folder_is_merged_as_it_is(tmp_path: Path) -> None:
    photos = Photos(tmp_path)
    photos.add(*numbered(0, 9))
    photos.write()
    photos.add(*numbered(20, 22))
    photos.append()
    write_shards(Squares(labelled=0), tmp_path / "squares", workers=1, progress=False)
    (tmp_path / "squares" / "index.json").write_text(
        (tmp_path / "squares" / "index.json").read_text().replace('"paper"', '"ground"').replace('"ink"', '"crack"')
    )
    index = ShardIndex.load(photos.out)
    other = ShardIndex.load(tmp_path / "squares").model_copy(update={"palette": index.palette})
    (tmp_path / "squares" / "index.json").write_bytes(other.to_json())
    merged = merge_shards([photos.out, tmp_path / "squares"], tmp_path / "all", progress=False).index
    assert {name: stream.samples for name, stream in merged.streams.items()} == {"labelled": 11, "unlabelled": 20}
    photos.out = tmp_path / "all"
    with pytest.raises(DataError, match=r"written by source merge, not folder; write the new images to a folder of"):
        photos.append()
