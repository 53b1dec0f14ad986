"""What a path is that was given for a shard folder and is none: raw data, an archive, a single shard; and what to do.

It is told by names alone; no file is opened, and a large folder is not listed to its end.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_ARCHIVES = (".zip", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
_LISTS = (".csv", ".jsonl")
_LOOKED_AT = 2000
"""Names of a folder that are looked at."""
_INDEX = "index.json"


def not_shards(root: Path) -> str | None:
    """What a path is instead of a shard folder, and the command that makes one of it.

    Args:
        root: a path without an index that can be read.

    Returns:
        One line without the path at its beginning; None: nothing that is known here.
    """
    if not root.exists():
        return "no such folder; write shards first (`maskmatch shards write --help`)"
    return _file(root) if not root.is_dir() else _folder(root)


def _file(path: Path) -> str | None:
    name = path.name.lower()
    if name.endswith(".tar"):
        return (
            "one shard, not a shard folder; make an index that lists it, and name that folder: "
            f"`maskmatch shards index {path} OUT` (with label maps: --labelled {path} --classes FILE)"
        )
    if name.endswith(_ARCHIVES):
        return "an archive, not a shard folder; unpack it, and " + _write("folder", "FOLDER")
    if name.endswith(_IMAGES):
        return "an image, not a shard folder; " + _write("folder", str(path.parent))
    if name.endswith(_LISTS):
        return "a list, not a shard folder; " + _write("list", str(path))
    return None


def _folder(folder: Path) -> str | None:
    names = _names(folder)
    if inside := next((name for name in names if (folder / name / _INDEX).is_file()), None):
        return f"not a shard folder, but there is one in it: {folder / inside}"
    if source := layout_of(folder):
        return "not a shard folder; " + _write(source, str(folder))
    if any(name.endswith(".tar") for name in names):
        return None  # said where indexes of other tools are looked for
    if _has_images(folder, names):
        return "not a shard folder, but images; " + _write("folder", str(folder))
    return None


def layout_of(folder: Path) -> str | None:
    """The source of `maskmatch shards write` that reads a folder, by its layout; None: none of the known ones."""
    names = set(_names(folder))

    def has(*paths: str) -> bool:
        return any((folder / path).is_dir() for path in paths)

    for below, layout in (("VOC2012", "voc"), ("VOCdevkit", "voc"), ("ADEChallengeData2016", "ade20k")):
        if below in names:
            return layout
    if "JPEGImages" in names and has("SegmentationClass", "SegmentationClassAug"):
        return "voc"
    if "leftImg8bit" in names:
        return "cityscapes"
    if has("images/training") and has("annotations/training"):
        return "ade20k"
    if names & {"stuffthingmaps", "stuffthingmaps_trainval2017"}:
        return "coco-stuff"
    images = {Path(name).stem for name in names if name.lower().endswith(_IMAGES)}
    if images & {Path(name).stem for name in names if name.endswith(".json")}:
        return "labelme"
    jsons = [name for name in names if name.endswith(".json")]
    if "annotations" in names:
        jsons += [name for name in _names(folder / "annotations") if name.endswith(".json")]
    with_images = has("images") or _has_images(folder, sorted(names))
    return "coco" if jsons and with_images else None


def _has_images(folder: Path, names: list[str]) -> bool:
    if any(name.lower().endswith(_IMAGES) for name in names):
        return True
    below = (folder / name for name in names if (folder / name).is_dir())
    return any(name.lower().endswith(_IMAGES) for each in itertools.islice(below, 50) for name in _names(each))


def _names(folder: Path) -> list[str]:
    """Some of the names in a folder, sorted, without hidden ones; none where it cannot be listed."""

    def visible() -> Iterator[str]:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries if not entry.name.startswith("."))

    try:
        return sorted(itertools.islice(visible(), _LOOKED_AT))
    except OSError:
        return []


def _write(source: str, path: str) -> str:
    more = " --classes FILE" if source in ("folder", "list") else ""
    return f"write one with `maskmatch shards write {source} {path} OUT{more}`, and name OUT"
