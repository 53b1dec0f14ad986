"""A folder of images, with label maps for all, some or none of them.

The label map of `IMAGES/a/b.jpg` is `LABELS/a/b.png`, or with the suffix `_mask.png`, `LABELS/a/b_mask.png`. Images
with a label map are `labelled`, the others `unlabelled`.
"""

from __future__ import annotations

import re
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.not_shards import layout_of
from maskmatch_scale.data.writing.sources.image_files import ImageFiles
from maskmatch_scale.data.writing.sources.listing import files_below, folder, folder_named, images_below
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.data.writing.sources.splits import Pair, hold_out, read_split, split_train

_LABEL_FOLDERS = ("labels", "masks", "annotations")


def image_folder(
    root: Path,
    options: Options,
    *,
    images: str | None = None,
    labels: str | None = None,
    label_suffix: str = ".png",
) -> ImageFiles:
    """List the samples of a folder.

    Args:
        root: the folder; paths of split files are relative to it.
        options: `dev` and `val` may also name a folder below that of the images.
        images: the folder of the images, relative to `root`; None: `images` if there is one, or `root` itself.
        labels: the folder of the label maps, relative to `root`; it may be that of the images. None: the first of
            `labels`, `masks`, `annotations` that is there, if one is.
        label_suffix: what takes the place of an image's ending in the name of its label map.
    """
    folder(root, "name the folder of the images")
    if images is None:
        images = "images" if (root / "images").is_dir() else ""
    else:
        folder_named(root, images, "--images")
    images = "" if images == "." else images.rstrip("/")
    if labels is None:
        labels = next((name for name in _LABEL_FOLDERS if (root / name).is_dir()), None)
    else:
        folder_named(root, labels, "--labels")
    labels = "" if labels == "." else labels and labels.rstrip("/")
    notes: list[str] = []
    if labels is None and (layout := layout_of(root)) is not None:
        hint = "source folder finds no label map in it without --labels"
        notes.append(f"{root} has the layout of source {layout}; {hint}")

    def train() -> list[Pair]:
        return _pairs(root, images, labels, label_suffix, notes)

    with_labels, without = split_train(options.split_labelled, options.split_unlabelled, train, lambda line: line)
    listing = {"labelled": with_labels, "unlabelled": without}
    if options.split_val is not None:
        listing["val"] = read_split(options.split_val)
        _all_labelled(listing["val"], f"{options.split_val}")
    for name, amount in (("val", options.val), ("dev", options.dev)):
        if amount is None:
            continue
        if name in listing:
            raise DataError(f"--{name} {amount}: --split-{name} says already what it holds; leave one of them out")
        below = f"{images}/{amount.strip('/')}/".lstrip("/")
        if re.search(r"[^\d.%+-]", amount) and not (root / below).is_dir():
            raise DataError(
                f"--{name} {amount}: no folder {root / below}, and no number; name a folder of images, or give a count "
                "(200) or a share (0.1)"
            )
        if re.fullmatch(r"[\d.]+", amount) or not (root / below).is_dir():
            listing["labelled"], listing[name] = hold_out(listing["labelled"], amount, options.split_seed, f"--{name}")
        else:
            listing[name] = [
                p for part in ("labelled", "unlabelled") for p in listing[part] if p.image.startswith(below)
            ]
            _all_labelled(listing[name], f"--{name} {amount}")
            listing["labelled"] = [p for p in listing["labelled"] if not p.image.startswith(below)]
    key_root = re.escape(f"{images}/") if images else ""
    return ImageFiles("folder", root, listing, options, key_root=key_root, notes=tuple(notes))


def _pairs(root: Path, images: str, labels: str | None, suffix: str, notes: list[str]) -> list[Pair]:
    """Every image with its label map, if it has one. What the user should know is added to `notes`."""
    apart = labels is not None and labels != images and f"{labels}/".startswith(f"{images}/" if images else "")
    found = images_below(root, images, (labels,) if apart and labels is not None else ())
    if labels is None:
        return [Pair(path) for path in found]
    there = {path for path in files_below(root, labels) if path.endswith(suffix)}
    pairs = []
    for path in found:
        name = path.removeprefix(f"{images}/") if images else path
        label = f"{labels}/{name[: name.rfind('.')]}{suffix}".lstrip("/")
        pairs.append(Pair(path, label if label in there and label != path else None))
    used = {pair.label for pair in pairs}
    pairs = [pair for pair in pairs if pair.image not in used]  # label maps that lie among the images
    if there and used == {None}:
        first = min(there)
        raise DataError(f"{root}: no label map fits an image, not even {first}; --labels and --label-suffix say how")
    if orphans := sorted(there - used - set(found)):
        notes.append(f"{len(orphans)} label maps in {root / labels} fit no image, such as {orphans[0]}")
    return pairs


def _all_labelled(pairs: list[Pair], what: str) -> None:
    for pair in pairs:
        if pair.label is None:
            raise DataError(f"{what}: {pair.image} has no label map, but held-out samples need one")
