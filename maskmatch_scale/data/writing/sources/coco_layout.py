"""Where the JSONs, images and PNGs of a COCO data set lie, by the conventions of COCO and of annotation tools.

::

    annotations/instances_train2017.json, train2017/ or images/train2017/      COCO
    annotations/instances_default.json, images/                                CVAT
    train/_annotations.coco.json and its images, valid/, test/                 Roboflow
    result.json, images/                                                       Label Studio
    labels.json, data/                                                         FiftyOne
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.sources.coco_json import CocoFile
from maskmatch_scale.data.writing.sources.found_instead import left_out_formats
from maskmatch_scale.data.writing.sources.listing import files_below, is_image

_OF_OTHER_TASKS = ("person_keypoints_", "captions_", "stuff_", "image_info_", "panoptic_", "instances_")
_ROBOFLOW = "_annotations.coco.json"
_NO_IMAGES = ("annotations", "labels", "masks")
"""Folders of a data set whose image files are label maps; so are those in a folder of a panoptic JSON's name."""
_TRIED = 50
"""Images of a JSON that are looked for to find their folder."""


@dataclass(frozen=True)
class Layout:
    """Where the images are.

    Attributes:
        root: what paths are relative to.
        paths: of the images of each JSON, in its order; also of those that are not there.
        others: image files in the same folders that no JSON names.
        key_root: as in :class:`ImageFiles`.
    """

    root: Path
    paths: Sequence[Sequence[str]]
    others: Sequence[str]
    key_root: str


def find_jsons(source: Path, panoptic: bool) -> list[Path]:
    """The JSONs of a data set: `source` itself if it is a file.

    Raises:
        DataError: there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder; give a COCO JSON, or the folder that holds it")
    kind = "panoptic_*.json" if panoptic else "instances_*.json"
    of_coco, of_roboflow = (f"annotations/{kind}", kind, f"*/annotations/{kind}"), (_ROBOFLOW, f"*/{_ROBOFLOW}")
    for group in (of_coco,) if panoptic else (of_coco, of_roboflow):
        if found := sorted(path for pattern in group for path in source.glob(pattern)):
            return found
    plain = sorted({*source.glob("*.json"), *source.glob("annotations/*.json")})
    found = [path for path in plain if not path.name.startswith(_OF_OTHER_TASKS)]
    if not panoptic and len(found) == 1:
        return found
    there = f"; of {len(plain)} .json files there, the first is {plain[0].name}" if plain else ""
    if any(path.name.startswith("panoptic_") for path in plain):
        there += "; --panoptic takes panoptic_*.json"
    wanted = f"annotations/{kind}" if panoptic else f"annotations/{kind}, train/{_ROBOFLOW} or a single .json"
    raise DataError(f"{source}: no COCO JSON in it: {wanted} is looked for{there}; name the JSON itself")


def subset_of(path: Path) -> str:
    """Whether a JSON is of `train`, `valid` or `test`, by its name or, where all have one name, by its folder's."""
    name = path.parent.name if path.name == _ROBOFLOW else _subset(path)
    match = re.match("(val|dev)|test", name.lower())
    return "train" if match is None else "valid" if match[1] else "test"


def segments_folder(path: Path, given: Path | None) -> Path:
    """The folder of the PNGs of a panoptic JSON: `given`, or the one beside the JSON that has its name.

    Raises:
        DataError: there is no such folder.
    """
    folder = (path.parent / path.stem if given is None else given).resolve()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --segments DIR is that of the PNGs of {path}")
    return folder


def place_images(source: Path, files: Sequence[CocoFile], given: Path | None, notes: list[str]) -> Layout:
    """Find the images of JSONs.

    Args:
        source: a JSON or a folder.
        files: its JSONs.
        given: `--images`, relative to the working directory or to the folder of `source`; None: found.
        notes: what the user should know is added.

    Raises:
        DataError: not one image of a JSON is found, or two JSONs name the same.
    """
    base = source if source.is_dir() else source.parent
    if given is not None:
        given = next((path for path in (given, base / given) if path.is_dir()), None) or _no_folder(given)
    folders = [_folder_of(file, given) for file in files]
    root = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    relative = [folder.resolve().relative_to(root).as_posix() for folder in folders]
    starts = ["" if path == "." else path for path in relative]
    no_images = (*_NO_IMAGES, *(file.path.stem for file in files))
    there = {}
    searched = [_searched(file, start, root) for file, start in zip(files, starts, strict=True)]
    for start in sorted(set(searched)):
        there[start] = files_below(root, start, [f"{start}/{name}".lstrip("/") for name in no_images])
    paths = [
        _paths(file, start, there[below], root, notes)
        for file, start, below in zip(files, starts, searched, strict=True)
    ]
    named: dict[str, Path] = {}
    for file, of_file in zip(files, paths, strict=True):
        for path in of_file:
            if path in named:
                raise DataError(f"{path} is named twice: in {named[path]} and in {file.path}; give one JSON")
            named[path] = file.path
    unnamed = sorted({path for found in there.values() for path in found} - named.keys())
    notes += left_out_formats(unnamed)  # those that a JSON names are read
    others = [path for path in unnamed if is_image(path)]
    shared = {os.path.commonpath([path.rpartition("/")[0] for path in of_file]) for of_file in paths}
    key_root = "|".join(re.escape(f"{start}/") for start in sorted(shared, key=len, reverse=True) if start)
    return Layout(root, paths, others, f"({key_root})" if key_root else "")


def _folder_of(file: CocoFile, given: Path | None) -> Path:
    """The folder in which most of the first images of a JSON are found, the first of equal ones."""
    beside, subset = file.path.parent, _subset(file.path)
    up = beside.parent if beside.name == "annotations" else beside
    if given is not None:
        candidates = [given / subset, given]
    else:
        under = [part for start in dict.fromkeys((up, beside)) for part in _below(start, subset)]
        candidates = [path for path in under if path.is_dir()]
    names = [_plain(image.file_name) for image in file.images[:_TRIED]]
    for tried in (names, [PurePosixPath(name).name for name in names]):
        hits = [sum((folder / name).is_file() for name in tried) for folder in candidates]
        if any(hits):
            return candidates[hits.index(max(hits))]
    places = ", ".join(map(str, candidates)) or str(up)
    raise DataError(f"{file.path}: its images are not found, not even {names[0]}, in {places}; --images DIR says where")


def _below(start: Path, subset: str) -> list[Path]:
    parts = ["images", "data", *(("", f"images/{subset}", subset) if subset else ("",))]
    return [start / part for part in parts]


def _subset(path: Path) -> str:
    """`train2017` of `instances_train2017.json`; empty if a name has no such part."""
    match = re.fullmatch("(?:instances|panoptic)_(.+)", path.stem)
    return match[1] if match else ""


def _searched(file: CocoFile, start: str, root: Path) -> str:
    """The folder below which a JSON has all its images: not more is searched for images that it does not name."""
    shared = os.path.commonpath([PurePosixPath(_plain(image.file_name)).parent for image in file.images])
    below = f"{start}/{shared}".strip("/")
    return below if (root / below).is_dir() else start


def _paths(file: CocoFile, start: str, there: Sequence[str], root: Path, notes: list[str]) -> list[str]:
    """The paths of the images of a JSON. By its name alone an image is found only if no other has this name."""
    known = set(there)
    names = Counter(path[path.rfind("/") + 1 :] for path in there)
    by_name = {path[path.rfind("/") + 1 :]: path for path in there}
    paths, moved, missing = [], [], []
    for image in file.images:
        plain = _plain(image.file_name)
        path = f"{start}/{plain}".lstrip("/")
        if path not in known and not (root / path).is_file():
            name = PurePosixPath(plain).name
            if names[name] == 1:
                path = by_name[name]
                moved.append(image.file_name)
            else:
                missing.append(path)
        paths.append(path)
    if moved:
        notes.append(f"{file.path}: {len(moved)} images are found by their names alone, such as {moved[0]}")
    if missing:
        what = f"{len(missing)} of {len(paths)} images are not there, such as {missing[0]}"
        notes.append(f"{file.path}: {what}; --skip-bad leaves them out")
    return paths


def _plain(file_name: str) -> str:
    """A file name with forward slashes, below the folder of images: of absolute ones and of `..` the name alone."""
    path = PurePosixPath(file_name.replace("\\", "/"))
    return path.name if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] else str(path)


def _no_folder(path: Path) -> Path:
    raise DataError(f"--images {path}: no such folder")
