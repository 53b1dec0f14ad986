"""What lies in a folder in place of the label maps or images that were looked for, for messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

_LIKE_IMAGES = (
    *(".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".exr", ".hdr", ".ppm", ".pgm"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".dcm", ".nii", ".nii.gz", ".nrrd", ".mha", ".img"),
    *(".npy", ".npz", ".mat", ".h5", ".hdf5", ".nc", ".mp4", ".avi", ".mov", ".mkv"),
)
"""Endings of files that people keep images in, and that are not taken for images here."""
_JPEG = (".jpg", ".jpeg")
_LABEL_ENDINGS = (".png", ".tif", ".tiff", ".bmp", ".gif")
"""Of formats that label maps may have."""
_BETWEEN = "._- "
"""What may lie between the name of an image and the rest of its label map's name."""
_SHARE = 4
"""Of so many images one must have a file of some ending for that to be told."""
_HINTS = 3
"""That are told at most, of either kind."""


def left_out_formats(files: Iterable[str]) -> list[str]:
    """A note of the files that hold images in formats that are not taken, or no note."""
    counts: Counter[str] = Counter()
    for path in files:
        ending = next((ending for ending in _LIKE_IMAGES if path.lower().endswith(ending)), None)
        if ending is not None:
            counts[ending] += 1
    if not counts:
        return []
    told = ", ".join(f"{count} {ending}" for ending, count in sorted(counts.items()))
    return [f"files of formats that are not read as images here are left out: {told}"]


def instead_of_labels(
    root: Path, start: str, images: Sequence[str], labels: str | None, suffix: str, files: Sequence[str]
) -> str:
    """What was found where no label map fits an image, with what to do about it.

    Args:
        root: what paths are relative to.
        start: the folder of the images.
        images: all of them, with label maps among them that were taken for images.
        labels: the folder of the label maps; None: there is none.
        suffix: the ending of label maps that was looked for.
        files: all files below `root`.

    Returns:
        For the end of a message; empty if nothing was found that could be labels.
    """
    hints = _jsons(root, files)
    taken = set(images)
    folders = {_stem(path): _parts(path.removeprefix(f"{start}/"))[0] for path in images}
    fits: dict[tuple[str, str], list[str]] = {}
    for path in files:
        folder, name = _parts(path)
        if fit := _fit(name, folders, path in taken):
            stem, ending = fit
            below = f"/{folders[stem]}" if folders[stem] else ""
            fits.setdefault((f"/{folder}".removesuffix(below)[1:], ending), []).append(path)
    fits = {fit: paths for fit, paths in fits.items() if len(paths) * _SHARE >= len(folders)}
    for (folder, ending), paths in sorted(fits.items(), key=lambda item: -len(item[1]))[:_HINTS]:
        there = f"{folder or root}: {len(paths)} files end in {ending}"
        if ending.lower().endswith(_JPEG):
            hints.append(f"{there}: JPEG changes the values of label maps, write PNGs")
        elif (folder, ending) == (labels, suffix):
            hints.append(f"{there}, but lie in other folders than their images, such as {paths[0]}")
        else:
            options = [] if folder == labels else [f"--labels {folder or '.'}"]
            options += [] if ending == suffix else [f"--label-suffix {ending}"]
            hints.append(f"{there}: {' '.join(options)}")
    hints += _twins(images)
    if labels and not hints:
        endings = Counter(Path(path).suffix for path in files if path.startswith(f"{labels}/"))
        hints += [f"{labels} holds {', '.join(f'{count} {ending}' for ending, count in endings.most_common(_HINTS))}"]
    return "; ".join(hints)


def _twins(images: Sequence[str]) -> list[str]:
    """A hint at two folders that hold images of the same names: one may hold the label maps of the other."""
    stems: dict[str, set[str]] = {}
    for path in images:
        stems.setdefault(path.split("/")[0] if "/" in path else "", set()).add(_stem(path))
    pairs = [(len(stems[a] & stems[b]), a, b) for a in sorted(stems) for b in sorted(stems) if a < b]
    count, one, other = max(pairs, default=(0, "", ""))
    if count * _SHARE < max(map(len, stems.values())) or not one:
        return []
    return [f"{one} and {other} have {count} images of the same names: --images and --labels say which is which"]


def _jsons(root: Path, files: Sequence[str]) -> list[str]:
    """A hint at a source that reads the JSONs which are there."""
    paths = [path for path in files if path.lower().endswith(".json")]
    for path in paths[:_HINTS]:
        try:
            content = json.loads((root / path).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and "shapes" in content:
            return [f"{len(paths)} .json files, such as {path}: labelme? use `maskmatch shards write labelme`"]
        if isinstance(content, dict) and "images" in content:
            return [f"{path} is a COCO JSON: use `maskmatch shards write coco`"]
    return []


def _fit(name: str, stems: Container[str], is_image: bool) -> tuple[str, str] | None:
    """The name of an image that the name of a file begins with, and what follows there; None: it is no label map."""
    if not name.lower().endswith((*_LABEL_ENDINGS, *_JPEG)):
        return None
    for at in range(len(name) - 1, 0, -1):
        own = is_image and name[at:] == name[name.rfind(".") :]
        if name[at] in _BETWEEN and not own and name[:at] in stems:
            return name[:at], name[at:]
    return None


def _parts(path: str) -> tuple[str, str]:
    """Folder and name."""
    folder, _, name = path.rpartition("/")
    return folder, name


def _stem(path: str) -> str:
    name = _parts(path)[1]
    return name[: name.rfind(".")]
