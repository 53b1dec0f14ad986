"""Parts written by several machines, and data sets, put together."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards import stored
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.index import ShardIndex, StreamEntry
from maskmatch_scale.data.shards.offsets import is_side_car_of, side_car
from maskmatch_scale.data.tools.verify import verify
from maskmatch_scale.data.writing import Part, merge_shards, write_shards
from maskmatch_scale.data.writing import merge as merge_module
from maskmatch_scale.data.writing.merging import summed_pixels
from maskmatch_scale.errors import UserError
from tests.data.writing.squares import Squares, contents, jpeg, keys

BAD = (2, 3, 4, 6, 16)
"""Of twenty samples in eight shards: the second shard holds 2, 3 and 4 only."""


def write(source: Squares, out: Path, part: str | None = None, **options) -> ShardIndex:
    given_part = None if part is None else Part.parse(part)
    return write_shards(source, out, workers=1, progress=False, skip_bad=True, part=given_part, **options)


def merge(folders: list[Path], out: Path, **options) -> ShardIndex:
    return merge_shards(folders, out, progress=False, **options).index


def written_parts(source: Squares, folder: Path, count: int, **options) -> list[Path]:
    parts = [folder / f"part-{number}" for number in range(1, count + 1)]
    for number, part in enumerate(parts, 1):
        write(source, part, f"{number}/{count}", **options)
    return parts


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 5),
    labelled=st.integers(0, 9),
    unlabelled=st.integers(1, 40),
    bad=st.sets(st.integers(0, 38), max_size=8),
    how=st.sampled_from(["link", "move", "copy"]),
    order=st.randoms(use_true_random=False),
)
def test_parts_together_are_what_one_writer_writes(
    tmp_path_factory, count, labelled, unlabelled, bad, how, order
) -> None:
    tmp_path = tmp_path_factory.mktemp("parts")
    source = Squares(labelled=labelled, unlabelled=unlabelled, bad=tuple(bad - {unlabelled - 1}))
    write(source, tmp_path / "whole", samples_per_shard=3)
    parts = written_parts(source, tmp_path, count, samples_per_shard=3)
    order.shuffle(parts)
    merge(parts, tmp_path / "out", how=how, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    merge(parts, tmp_path / "out", how=how)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_parts_share_the_work(tmp_path: Path) -> None:
    parts = written_parts(Squares(), tmp_path, 3)
    names = [{path.name for path in part.glob("*.tar")} for part in parts]
    assert sorted(map(len, names)) == [4, 4, 5]
    assert len(set().union(*names)) == 13
    assert list(verify(parts[0])) == []
    with pytest.raises(DataError, match=r"only part 2/3 of a data set; .*shards merge"):
        load_index(str(parts[1]))


def test_a_part_that_was_killed_goes_on(tmp_path: Path) -> None:
    write(Squares(), tmp_path / "whole")
    write(Squares(), tmp_path / "1", "1/2")
    source = Squares(kill_at=16, kill_file=str(tmp_path / "killed"))
    process = multiprocessing.get_context("fork").Process(target=write, args=(source, tmp_path / "2", "2/2"))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "2").glob("[!.]*.tar")}
    assert done
    with pytest.raises(DataError, match="no index"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    write(source, tmp_path / "2", "2/2")
    assert all((tmp_path / "2" / name).stat().st_mtime_ns == time for name, time in done.items())
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_table_of_many_shards_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "LARGE", 4)
    write(Squares(), tmp_path / "whole")
    merge(written_parts(Squares(), tmp_path, 2), tmp_path / "out")
    assert list((tmp_path / "whole").glob("shards-*.safetensors"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _merge_and_die(folders: list[Path], out: Path, how: str, when: str) -> None:
    """This process dies by SIGKILL at the fifth shard: before it, after it, or while it is copied."""
    put, count = merge_module._put, []

    def counted(source: Path, target: Path, how: str) -> None:
        count.extend([1] * (target.suffix == ".tar"))
        if len(count) == 5 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        put(source, target, how)
        if len(count) == 5 and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    def half(source: Path, target: Path) -> None:
        data = Path(source).read_bytes()
        Path(target).write_bytes(data if len(count) < 5 else data[: len(data) // 2])
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    merge_module._put = counted
    if when == "within":
        merge_module.shutil.copyfile = half
        merge_module._renamed = lambda source, target: False  # as if the result were on another disk
    merge(folders, out, how=how)


@pytest.mark.parametrize(
    ("how", "when"), [("link", "before"), ("move", "after"), ("move", "within"), ("copy", "within")]
)
def test_a_killed_merge_goes_on_and_nothing_is_lost(tmp_path: Path, how: str, when: str) -> None:
    write(Squares(bad=BAD), tmp_path / "whole")
    parts = written_parts(Squares(bad=BAD), tmp_path, 2)
    process = multiprocessing.get_context("fork").Process(
        target=_merge_and_die, args=(parts, tmp_path / "out", how, when)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out" / "index.json").exists()
    assert len(list((tmp_path / "out").glob("[!.]*.tar"))) == (5 if when == "after" else 4)
    there = {path.name for folder in [*parts, tmp_path / "out"] for path in folder.glob("[!.]*.tar")}
    assert there == {path.name for path in (tmp_path / "whole").glob("*.tar")}
    with pytest.raises(DataError, match="--overwrite does not delete them"):
        write(Squares(bad=BAD), tmp_path / "out", overwrite=True)
    with pytest.raises(DataError, match=r"was begun with merging=True.*finish it by"):
        write(Squares(bad=BAD), tmp_path / "out")
    merge(parts, tmp_path / "out", how=how, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert bool(list(parts[0].glob("*.tar"))) == (how != "move")


def test_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = written_parts(Squares(), tmp_path, 2)

    def refuse(*paths: object, **options: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    shard = parts[0] / "labelled-000000.tar"
    merge(parts, tmp_path / "linked")
    assert (tmp_path / "linked" / shard.name).samefile(shard)
    monkeypatch.setattr(merge_module.os, "link", refuse)
    merge(parts, tmp_path / "copied")
    assert not (tmp_path / "copied" / shard.name).samefile(shard)
    monkeypatch.setattr(merge_module, "_renamed", lambda source, target: False)
    merge(parts, tmp_path / "moved", how="move")
    assert not shard.exists()
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked") == contents(tmp_path / "moved")


@dataclass(frozen=True)
class Others(Squares):
    """As `Squares`, with other keys and other bytes."""

    @property
    def settings(self):
        return {**super().settings, "others": True}

    @staticmethod
    def render(item):
        sample = Squares.render(item)
        return type(sample)(f"other-{item.number}", sample.image, sample.extension, sample.label)


@dataclass(frozen=True)
class Brighter(Squares):
    """As `Squares`, with the same keys and other images."""

    @staticmethod
    def render(item):
        sample = Squares.render(item)
        return type(sample)(sample.key, jpeg(item.number + 100), sample.extension, sample.label)


def test_data_sets_are_appended(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write(Squares(bad=BAD), a)
    write(Others(labelled=0, bad=(0, 7)), b)
    index = merge([a, b], tmp_path / "out")
    assert list(verify(tmp_path / "out")) == []
    assert keys(tmp_path / "out", "labelled") == keys(a, "labelled")
    assert keys(tmp_path / "out", "unlabelled") == keys(a, "unlabelled") + keys(b, "unlabelled")
    files = [shard.file for shard in index.streams["unlabelled"].shards]
    assert files == [f"unlabelled-{number:06d}.tar" for number in range(16) if number != 1]
    for stream in index.streams.values():
        for shard in stream.shards:
            assert is_side_car_of(tmp_path / "out" / side_car(shard.file), shard.sha256)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["shard"] for line in skipped[-2:]] == ["unlabelled-000008.tar", "unlabelled-000011.tar"]
    assert len(skipped) == len(BAD) + 2
    before = contents(tmp_path / "out")
    assert merge([a, b], tmp_path / "out") == index
    with pytest.raises(DataError, match=r"choose another folder$"):
        merge([b, a], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    third = tmp_path / "third"
    write(Others(labelled=3, unlabelled=0), third)
    labelled = merge([tmp_path / "out", third], tmp_path / "all").streams["labelled"]
    assert (labelled.samples, labelled.class_pixels) == (8, (0, 8 * 64, 0))


def test_equal_keys_of_data_sets_are_counted(tmp_path: Path) -> None:
    write(Squares(labelled=3, unlabelled=4), tmp_path / "a")
    write(Brighter(labelled=0, unlabelled=6), tmp_path / "b")
    (note,) = merge_shards([tmp_path / "a", tmp_path / "b"], tmp_path / "out", progress=False).notes
    assert "'unlabelled': 4 samples have the key of another one" in note
    write(Others(), tmp_path / "c")
    assert merge_shards([tmp_path / "a", tmp_path / "c"], tmp_path / "other", progress=False).notes == ()


def changed(folder: Path, **changes) -> Path:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    first, second = parts = written_parts(Squares(), tmp_path, 2)
    write(Squares(), tmp_path / "whole")
    write(Others(labelled=2, unlabelled=0), tmp_path / "others")
    write(Squares(seed=1), tmp_path / "seed", "2/2")
    write(Squares(), tmp_path / "third", "2/3")
    black = changed(shutil.copytree(tmp_path / "others", tmp_path / "black"), palette=[[0, 0, 0], [0, 0, 0]])
    three = [[0, 0, 0]] * 3
    more = changed(shutil.copytree(tmp_path / "others", tmp_path / "more"), classes=["a", "b", "c"], palette=three)
    value = changed(shutil.copytree(tmp_path / "others", tmp_path / "value"), ignore_index=254)
    for folders, message in [
        ([first], r"part 2/2 missing: name the folders of all 2 parts"),
        ([first, shutil.copytree(first, tmp_path / "copy")], "are both part 1/2"),
        ([first, tmp_path / "seed"], r"seed: seed=1, but .*part-1 has 0"),
        ([first, tmp_path / "third"], r"third is part 2/3, but .*part-1 is part 1/2"),
        ([*parts, tmp_path / "whole"], "whole is a whole one; merge the parts first"),
        ([tmp_path / "whole", black], r"black: palette has \(0, 0, 0\) as number 0, not \(255, 255, 255\)"),
        ([tmp_path / "whole", more], r"more: classes are 3, not 2, as .*whole has"),
        ([tmp_path / "whole", value], "ignore_index is 254, not 255"),
        ([tmp_path / "whole", shutil.copytree(tmp_path / "whole", tmp_path / "twice")], "there twice"),
        ([tmp_path / "nothing"], "no such folder"),
    ]:
        with pytest.raises(DataError, match=message):
            merge(folders, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="part-1: named twice"):
        merge([first, second, first], tmp_path / "out")
    with pytest.raises(UserError, match="one of the folders"):
        merge(parts, first)
    for name in parts:
        (name / "duplicates.jsonl").write_text(f'{{"image": "{name.name}"}}\n')
    with pytest.raises(DataError, match=r"part-2/duplicates\.jsonl: not that of .*part-1"):
        merge(parts, tmp_path / "out")


def test_shards_that_are_not_as_their_index_says(tmp_path: Path) -> None:
    parts = written_parts(Squares(), tmp_path, 2)
    shard = parts[1] / "labelled-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(b"\0" + data[1:])
    merge(parts, tmp_path / "unseen")
    with pytest.raises(DataError, match=r"labelled-000001\.tar: its bytes are not those"):
        merge(parts, tmp_path / "out", check=True)
    with pytest.raises(DataError, match=r"unseen/labelled-000001\.tar: its bytes are not those"):
        merge(parts, tmp_path / "unseen", check=True)
    shard.unlink()
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"01\.tar: {len(data) - 1} bytes, but its index says {len(data)}"):
        merge(parts, tmp_path / "out")
    for path in parts[1].glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"labelled-000001\.tar: not there \(and 5 more shards\); .*shards write"):
        merge(parts, tmp_path / "other")
    write(Squares(), parts[1], "2/2")
    merge(parts, tmp_path / "out", check=True)
    assert list(verify(tmp_path / "out")) == []


def test_a_folder_of_other_shards_is_not_merged(tmp_path: Path) -> None:
    write(Squares(), tmp_path / "a")
    text = (tmp_path / "a" / "index.json").read_text()
    (tmp_path / "a" / "index.json").write_text(text.replace("labelled-000000.tar", "a.tar"))
    with pytest.raises(DataError, match=r"names a\.tar, which .*shards index"):
        merge([tmp_path / "a"], tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "labelled-000000.tar").write_bytes(b"theirs")
    parts = written_parts(Squares(), tmp_path, 2)
    with pytest.raises(DataError, match=r"labelled-000000\.tar: exists"):
        merge(parts, tmp_path / "out")
    assert contents(tmp_path / "out") == {"labelled-000000.tar": b"theirs"}


def test_a_folder_that_was_put_together_is_written_by_nothing_else(tmp_path: Path) -> None:
    write(Squares(), tmp_path / "a")
    write(Others(labelled=0), tmp_path / "b")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(DataError, match=r"^\S+: holds shards written from other folders than these; choose another"):
        merge([tmp_path / "a"], tmp_path / "out")
    with pytest.raises(
        DataError, match=r"with source='merge', but source='squares' is asked for; choose another folder$"
    ):
        write(Squares(), tmp_path / "out")


def test_a_part_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    write(Squares(), tmp_path, "1/2")
    with pytest.raises(DataError, match="part='1/2', but part='2/2' is asked for; give each part"):
        write(Squares(), tmp_path, "2/2")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_a_part_is_a_number_of_a_number(text: str) -> None:
    with pytest.raises(UserError, match=r"--part .*: write I/N"):
        Part.parse(text)


def test_pixels_of_classes_are_added_up(tmp_path: Path) -> None:
    shards = write(Squares(), tmp_path).streams["labelled"].shards
    entries = [StreamEntry(labelled=True, shards=shards, class_pixels=(1, 2)) for _ in range(2)]
    nothing = StreamEntry(labelled=True, shards=())
    assert summed_pixels([*entries, nothing]) == (2, 4)
    assert summed_pixels([*entries, StreamEntry(labelled=True, shards=shards)]) is None
    assert summed_pixels([nothing]) is None
