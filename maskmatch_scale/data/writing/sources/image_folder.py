"""A folder of images, with label maps for all, some or none of them.

The label map of `IMAGES/a/b.jpg` is `LABELS/a/b.png`, or with the suffix `_mask.png`, `LABELS/a/b_mask.png`. Images
with a label map are `labelled`, the others `unlabelled`.
"""

from __future__ import annotations

import re
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.not_shards import layout_of
from maskmatch_scale.data.writing.sources.found_instead import instead_of_labels, left_out_formats
from maskmatch_scale.data.writing.sources.image_files import ImageFiles
from maskmatch_scale.data.writing.sources.listing import files_below, folder, folder_named, is_image
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
        pairs = _pairs(root, images, labels, label_suffix, notes)
        if options.split_labelled is None and pairs and not any(pair.label for pair in pairs):
            told = _without_labels(root, images, pairs, labels, label_suffix)
            maps = labels is not None and any(path.endswith(label_suffix) for path in files_below(root, labels))
            if options.classes is not None or (maps and labels != images):
                raise DataError(f"{root}: {told}")
            if labels is not None:
                notes.append(f"all images are unlabelled: {told}")
        return pairs

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
    files = files_below(root, images, (labels,) if apart and labels is not None else ())
    notes += left_out_formats(files)
    found = [path for path in files if is_image(path)]
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
    if bare := sum(pair.label is None for pair in pairs) if used != {None} else 0:
        notes.append(f"{bare} of {len(pairs)} images have no label map: unlabelled")
    if orphans := sorted(there - used - set(found)):
        notes.append(f"{len(orphans)} label maps in {root / labels} fit no image, such as {orphans[0]}")
    return pairs


def _without_labels(root: Path, images: str, pairs: list[Pair], labels: str | None, suffix: str) -> str:
    """That no image has a label map, what was found instead, and what to do."""
    files = files_below(root)
    found = instead_of_labels(root, images, [pair.image for pair in pairs], labels, suffix, files)
    where = f"folder {' or '.join(_LABEL_FOLDERS)}" if labels is None else f"{suffix} in {labels or root} that fits it"
    remedy = "--labels and --label-suffix say where label maps are; without --classes images alone are written"
    lacking = f"no label map is found for {len(pairs)} images, such as {pairs[0].image}: there is no {where}"
    return f"{lacking}; {found or remedy}"


def _all_labelled(pairs: list[Pair], what: str) -> None:
    for pair in pairs:
        if pair.label is None:
            raise DataError(f"{what}: {pair.image} has no label map, but held-out samples need one")
