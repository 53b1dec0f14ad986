"""The shard writer, driven by a source that costs nothing to render."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.writing import EncodedSample, StreamItems, write_shards


@dataclass(frozen=True)
class Item:
    number: int
    labelled: bool
    kill_file: str = ""
    bad: bool = False


@dataclass(frozen=True)
class Squares:
    """Grey squares. `kill_at`: the process that renders this unlabelled sample dies by SIGKILL, once.

    `bad`: unlabelled samples that cannot be used.
    """

    seed: int = 0
    labelled: int = 5
    unlabelled: int = 20
    kill_at: int = -1
    kill_file: str = ""
    bad: tuple[int, ...] = ()

    name: str = field(default="squares", init=False)
    classes: tuple[str, ...] = field(default=("paper", "ink"), init=False)
    palette: tuple[tuple[int, int, int], ...] = field(default=((255, 255, 255), (0, 0, 0)), init=False)
    ignore_index: int = field(default=255, init=False)

    @property
    def settings(self) -> Mapping[str, object]:
        return {"seed": self.seed, "labelled": self.labelled, "unlabelled": self.unlabelled}

    @property
    def streams(self) -> Mapping[str, StreamItems]:
        return {
            "labelled": StreamItems(True, [Item(n, True) for n in range(self.labelled)]),
            "unlabelled": StreamItems(
                False,
                [
                    Item(n, False, self.kill_file if n == self.kill_at else "", n in self.bad)
                    for n in range(self.unlabelled)
                ],
            ),
        }

    @staticmethod
    def render(item: Item) -> EncodedSample:
        if item.kill_file and not Path(item.kill_file).exists():
            Path(item.kill_file).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item.bad:
            raise BadSample("not_an_image", f"square {item.number}: not square")
        label = png(1) if item.labelled else None
        return EncodedSample(f"square-{item.number:04d}", jpeg(item.number), "jpg", label)


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "JPEG")
    return buffer.getvalue()


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return buffer.getvalue()


def keys(folder: Path, name: str) -> list[str]:
    """Of a stream, as training reads it."""
    # Not with the others: processes that render squares need no torch.
    from maskmatch_scale.data.shards.reading import ShardStream

    stream = ShardStream(folder, name)
    return [stream[number].key for number in range(len(stream))]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_is_written_can_be_read_back(tmp_path: Path) -> None:
    from maskmatch_scale.data.shards.reading import ShardStream
    from maskmatch_scale.data.tools.verify import verify

    index = write_shards(Squares(), tmp_path, workers=1, progress=False)
    assert index == ShardIndex.load(tmp_path)
    assert list(verify(tmp_path)) == []
    labelled, unlabelled = ShardStream(tmp_path, "labelled"), ShardStream(tmp_path, "unlabelled")
    assert (len(labelled), len(unlabelled)) == (5, 20)
    assert [labelled[n].key for n in range(5)] == [f"square-{n:04d}" for n in range(5)]
    assert labelled[3].label == png(1)
    assert unlabelled[7].image == jpeg(7)
    assert all(unlabelled[n].label is None for n in range(20))
    assert len(index.streams["labelled"].shards) == 5
    assert len(index.streams["unlabelled"].shards) == 8


@pytest.mark.parametrize(("samples", "per_shard", "shards"), [(3, 256, 3), (20, 256, 8), (100, 10, 10), (101, 10, 11)])
def test_shards_of_a_stream_are_even(tmp_path: Path, samples: int, per_shard: int, shards: int) -> None:
    index = write_shards(Squares(unlabelled=samples), tmp_path, workers=1, samples_per_shard=per_shard, progress=False)
    sizes = [shard.samples for shard in index.streams["unlabelled"].shards]
    assert len(sizes) == shards
    assert sum(sizes) == samples
    assert max(sizes) <= per_shard
    assert max(sizes) - min(sizes) <= 1


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for workers in (1, 3):
        write_shards(Squares(), tmp_path / str(workers), workers=workers, progress=False)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_killed_worker_is_reported_and_a_restart_renders_only_the_rest(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_shards(Squares(), whole, workers=1, progress=False)
    source = Squares(kill_at=12, kill_file=str(tmp_path / "killed"))
    with pytest.raises(DataError, match="killed"):
        write_shards(source, broken, workers=2, progress=False)
    _assert_finished_shards_are_kept(source, broken, whole)


def test_a_killed_writer_leaves_nothing_half_written(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_shards(Squares(), whole, workers=1, progress=False)
    source = Squares(kill_at=12, kill_file=str(tmp_path / "killed"))
    # With one worker the writer itself renders, so it is the writer that dies, in the middle of a shard.
    process = multiprocessing.get_context("spawn").Process(
        target=write_shards, args=(source, broken), kwargs={"workers": 1, "progress": False}
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    _assert_finished_shards_are_kept(source, broken, whole)


def _assert_finished_shards_are_kept(source: Squares, broken: Path, whole: Path, *, skip_bad: bool = False) -> None:
    with pytest.raises(DataError, match="no index"):
        ShardIndex.load(broken)
    before = {path.name: path.stat().st_mtime_ns for path in broken.glob("[!.]*.tar")}
    assert 0 < len(before) < 13
    assert all((broken / name).read_bytes() == (whole / name).read_bytes() for name in before)
    write_shards(source, broken, workers=1, progress=False, skip_bad=skip_bad)
    assert contents(broken) == contents(whole)
    assert all((broken / name).stat().st_mtime_ns == time for name, time in before.items())


BAD = (2, 3, 4, 6, 16)
"""Of twenty samples in eight shards: the second shard holds 2, 3 and 4 only."""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_sample_ends_the_writing_which_goes_on_without_it(tmp_path: Path, workers: int) -> None:
    source = Squares(bad=BAD)
    with pytest.raises(BadSample, match="square 2: not square; --skip-bad"):
        write_shards(source, tmp_path, workers=workers, progress=False)
    index = write_shards(source, tmp_path, workers=workers, progress=False, skip_bad=True)
    shards = index.streams["unlabelled"].shards
    assert [(shard.file, shard.samples) for shard in shards][:2] == [
        ("unlabelled-000000.tar", 2),
        ("unlabelled-000002.tar", 1),
    ]
    assert keys(tmp_path, "unlabelled") == [f"square-{n:04d}" for n in range(20) if n not in BAD]
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["item"], line["reason"]) for line in lines] == [(n, "not_an_image") for n in BAD]
    assert (lines[0]["shard"], lines[0]["message"]) == ("unlabelled-000001.tar", "square 2: not square")


def test_a_killed_writer_knows_what_it_left_out(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_shards(Squares(bad=BAD), whole, workers=1, progress=False, skip_bad=True)
    source = Squares(bad=BAD, kill_at=12, kill_file=str(tmp_path / "killed"))
    with pytest.raises(DataError, match="killed"):
        write_shards(source, broken, workers=2, progress=False, skip_bad=True)
    # As if the kill had come while a line was written.
    with (broken / ".written.jsonl").open("ab") as journal:
        journal.write(b'{"file": "unlabelled-0000')
    _assert_finished_shards_are_kept(source, broken, whole, skip_bad=True)


def test_shards_without_a_journal_are_looked_into(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_shards(Squares(), whole, workers=1, progress=False)
    source = Squares(kill_at=12, kill_file=str(tmp_path / "killed"))
    with pytest.raises(DataError, match="killed"):
        write_shards(source, broken, workers=2, progress=False)
    (broken / ".written.jsonl").unlink()
    with (broken / "labelled-000001.tar").open("r+b") as file:
        file.truncate(1000)
    write_shards(source, broken, workers=1, progress=False)
    assert contents(broken) == contents(whole)


def test_a_lost_shard_is_rendered_again_and_what_was_left_out_stays_listed(tmp_path: Path) -> None:
    source = Squares(bad=BAD)
    write_shards(source, tmp_path, workers=1, progress=False, skip_bad=True)
    before = contents(tmp_path)
    (tmp_path / "unlabelled-000002.tar").unlink()
    (tmp_path / "labelled-000000.tar").unlink()
    write_shards(source, tmp_path, workers=1, progress=False, skip_bad=True)
    assert contents(tmp_path) == before


def test_a_stream_of_bad_samples_alone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'unlabelled' could be used; skipped\.jsonl"):
        write_shards(Squares(bad=tuple(range(20))), tmp_path, workers=1, progress=False, skip_bad=True)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 20


def test_shards_of_somebody_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labelled-000007.tar").write_bytes(b"theirs")
    with pytest.raises(DataError, match=r"labelled-000007\.tar.* another folder"):
        write_shards(Squares(), tmp_path, workers=1, progress=False)
    assert contents(tmp_path) == {"labelled-000007.tar": b"theirs"}


def test_a_source_may_drop_and_order_its_samples(tmp_path: Path) -> None:
    calls = []

    class Reversed(Squares):
        def prepare(self, out: Path, *, resumed: bool, workers: int, progress: bool) -> Mapping[str, StreamItems]:
            calls.append((out, resumed))
            return {"labelled": StreamItems(True, self.streams["labelled"].items[::-1][:3])}

    index = write_shards(Reversed(), tmp_path, workers=1, progress=False)
    assert list(index.streams) == ["labelled"]
    assert keys(tmp_path, "labelled") == ["square-0004", "square-0003", "square-0002"]
    (tmp_path / "labelled-000001.tar").unlink()
    assert write_shards(Reversed(), tmp_path, workers=1, progress=False) == index
    assert write_shards(Reversed(), tmp_path, workers=1, progress=False) == index
    assert calls == [(tmp_path, False), (tmp_path, True)]


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_shards(Squares(), tmp_path, workers=1, progress=False)
    monkeypatch.setattr("maskmatch_scale.data.writing.write._render_all", None)
    assert write_shards(Squares(), tmp_path, workers=1, progress=False) == index


def test_a_lost_or_cut_shard_is_rendered_again(tmp_path: Path) -> None:
    write_shards(Squares(), tmp_path, workers=1, progress=False)
    before = contents(tmp_path)
    (tmp_path / "labelled-000001.tar").unlink()
    with (tmp_path / "unlabelled-000003.tar").open("r+b") as file:
        file.truncate(1000)
    write_shards(Squares(), tmp_path, workers=1, progress=False)
    assert contents(tmp_path) == before


def test_other_settings_are_refused_with_the_key(tmp_path: Path) -> None:
    write_shards(Squares(), tmp_path, workers=1, progress=False)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"seed=0, but seed=1 .* another folder"):
        write_shards(Squares(seed=1), tmp_path, workers=1, progress=False)
    with pytest.raises(DataError, match="samples_per_shard=256, but samples_per_shard=2"):
        write_shards(Squares(), tmp_path, workers=1, samples_per_shard=2, progress=False)
    assert contents(tmp_path) == before


def test_other_settings_are_refused_before_the_index_is_there(tmp_path: Path) -> None:
    source = Squares(kill_at=12, kill_file=str(tmp_path / "killed"))
    with pytest.raises(DataError):
        write_shards(source, tmp_path / "out", workers=2, progress=False)
    with pytest.raises(DataError, match="seed=0, but seed=1"):
        write_shards(Squares(seed=1), tmp_path / "out", workers=1, progress=False)


@dataclass(frozen=True)
class Bad(Squares):
    @staticmethod
    def render(item: Item) -> EncodedSample:
        if item.number == 1:
            return BAD_SAMPLE[0]
        return Squares.render(item)


BAD_SAMPLE = [EncodedSample("", b"", "jpg")]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (EncodedSample("a.b", b"x", "jpg", b"y"), "no dot"),
        (EncodedSample("a", b"x", "jpg", None), "carries no label map"),
        (EncodedSample("a", b"x", "bmp", b"y"), "none of jpg"),
        (EncodedSample("a", b"x", "png", b"y"), "store the image as jpg or webp"),
        (EncodedSample("square-0000", b"x", "jpg", b"y"), "two samples"),
    ],
)
def test_a_sample_that_would_not_read_back_is_refused(tmp_path: Path, sample: EncodedSample, message: str) -> None:
    BAD_SAMPLE[0] = sample
    with pytest.raises(DataError, match=message):
        write_shards(Bad(labelled=20), tmp_path, workers=1, progress=False)
    assert not list(tmp_path.glob("labelled-000000.tar"))
    assert not (tmp_path / "index.json").exists()


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            write_shards(Squares(), tmp_path, workers=1, progress=False)


def test_progress_without_a_terminal_is_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(Squares(), tmp_path, workers=1)
    assert "squares: 25/25 samples" in capsys.readouterr().err


def test_processes_that_render_need_no_torch() -> None:
    """Importing torch takes seconds in each of them."""
    code = (
        "import sys, maskmatch_scale.data.writing.sources.image_files, maskmatch_scale.scores.source;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
