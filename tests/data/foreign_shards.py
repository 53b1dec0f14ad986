"""Archives as other tools lay them out, written by webdataset's writer: without an index of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import webdataset

from tests.data.bad_shards import jpeg

COUNTS = (3, 5, 0, 4)
"""Samples of the shards that the layouts below have by default; the third is empty, as after a failed download."""


def write_tar(path: Path, count: int, first: int = 0) -> Path:
    """A shard of ``count`` samples as img2dataset writes them; keys and pictures are numbered from ``first``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for number in range(first, first + count):
            key = f"{number:09d}"
            text = {"json": json.dumps({"key": key, "width": 128}).encode(), "txt": b"a caption. With a dot"}
            tar.write({"__key__": key, "jpg": jpeg(number), **text})
    return path


def write_tars(folder: Path, counts: Sequence[int] = COUNTS) -> list[Path]:
    """Shards 00000.tar and so on; the samples are numbered over all shards."""
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    return [
        write_tar(folder / f"{number:05d}.tar", count, first)
        for number, (count, first) in enumerate(zip(counts, firsts, strict=True))
    ]


def img2dataset(folder: Path, counts: Sequence[int] = COUNTS) -> str:
    """Its layout: a tar, a table and a note for each shard."""
    for path, count in zip(write_tars(folder, counts), counts, strict=True):
        note(path, count)
        path.with_suffix(".parquet").write_bytes(b"PAR1")
    return str(folder)


def note(tar: Path, successes: int) -> None:
    """What img2dataset notes of a shard."""
    content = {"count": successes + 2, "successes": successes, "failed_to_download": 2, "status_dict": {}}
    tar.with_name(f"{tar.stem}_stats.json").write_text(json.dumps(content, indent=4))


def wids(folder: Path, counts: Sequence[int] = COUNTS, **more: Any) -> str:
    """A list as `wids-index` writes it."""
    shards = [
        {"url": path.name, "md5sum": "0" * 32, "nsamples": count, "filesize": path.stat().st_size}
        for path, count in zip(write_tars(folder, counts), counts, strict=True)
    ]
    content = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "x", "shardlist": shards, **more}
    (folder / "shards.json").write_text(json.dumps(content))
    return str(folder / "shards.json")


def energon(folder: Path, counts: Sequence[int] = COUNTS) -> str:
    """Its `.nv-meta`, with all shards for training."""
    names = [str(path.relative_to(folder)) for path in write_tars(folder / "shards", counts)]
    meta = folder / ".nv-meta"
    meta.mkdir()
    info = {"energon_version": "7.0.0", "shard_counts": dict(zip(names, counts, strict=True))}
    (meta / ".info.json").write_text(json.dumps(info))
    train = f"shards/{{00000..{len(counts) - 1:05d}}}.tar"
    split = f"split_parts:\n  train:\n  - {train}\n  val: []\n  test: []\nexclude: []\n"
    (meta / "split.yaml").write_text(split)
    return str(folder)


def energon_yaml(folder: Path, counts: Sequence[int] = COUNTS) -> str:
    """As older versions write it."""
    energon(folder, counts)
    content = json.loads((folder / ".nv-meta/.info.json").read_text())
    (folder / ".nv-meta/.info.json").unlink()
    (folder / ".nv-meta/.info.yaml").write_text(json.dumps(content))
    return str(folder)


def energon_file(folder: Path, counts: Sequence[int] = COUNTS) -> str:
    """Named by the file itself."""
    return f"{energon(folder, counts)}/.nv-meta/.info.json"


def open_clip(folder: Path, counts: Sequence[int] = COUNTS) -> str:
    """Its `sizes.json`."""
    names = [path.name for path in write_tars(folder, counts)]
    (folder / "sizes.json").write_text(json.dumps(dict(zip(names, counts, strict=True))))
    return str(folder)


def text(folder: Path, counts: Sequence[int] = COUNTS) -> str:
    """A list by hand."""
    paths = write_tars(folder, counts)
    lines = [f"{path.name}\t{count}" for path, count in zip(paths, counts, strict=True)]
    lines[0] += f" {paths[0].stat().st_size}"
    (folder / "shards.txt").write_text("# mine\n" + "\n".join(lines) + "\n")
    return str(folder / "shards.txt")


def text_beside_notes(folder: Path, counts: Sequence[int] = COUNTS) -> str:
    """A list of names alone, in a folder of img2dataset's."""
    img2dataset(folder, counts)
    (folder / "shards.txt").write_text("\n".join(sorted(path.name for path in folder.glob("*.tar"))))
    return str(folder / "shards.txt")


LAYOUTS: dict[str, Callable[[Path], str]] = {
    layout.__name__: layout
    for layout in (img2dataset, wids, energon, energon_yaml, energon_file, open_clip, text, text_beside_notes)
}
"""Each writes an archive into a folder, and returns its root."""
