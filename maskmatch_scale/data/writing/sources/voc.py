"""Pascal VOC 2012 (`VOCdevkit/VOC2012`), with or without the additional labels of SBD.

`ImageSets/Segmentation/train.txt` is `labelled`, `val.txt` is `val`. A label map is looked for in `SegmentationClass`
first, then in `SegmentationClassAug`. UniMatch's download has all of them in `SegmentationClass`, and its split files
name them so; with these files the same samples are found here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.sources.classes import built_in_classes
from maskmatch_scale.data.writing.sources.image_files import ImageFiles
from maskmatch_scale.data.writing.sources.listing import folder
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.data.writing.sources.splits import Pair, hold_out_dev, read_split, split_train

_SETS = "ImageSets/Segmentation"
_AUGMENTED = ("trainaug.txt", "train_aug.txt")
_LABELS = ("SegmentationClass", "SegmentationClassAug")


def voc(root: Path, options: Options, *, aug: bool = False, all_images: bool = False) -> ImageFiles:
    """List the samples of Pascal VOC 2012.

    Args:
        root: `VOC2012`, or the folder it lies in.
        options: `split_*` files name samples by their image; `classes` and `id_map` take the place of VOC's.
        aug: label all of `trainaug.txt` (or `train_aug.txt`; without such a file, all of `SegmentationClassAug` that is
            not in `val.txt`), not only `train.txt`.
        all_images: make the other images of `JPEGImages` `unlabelled`.
    """
    root = root / "VOC2012" if (root / "VOC2012").is_dir() else root
    what = "it is part of VOC2012, which SOURCE must name; other layouts: `maskmatch shards write folder`"
    images = _stems(folder(root / "JPEGImages", what), ".jpg")
    labels = {place: _stems(root / place, ".png") for place in _LABELS}

    def pair(stem: str) -> Pair:
        place = next((place for place in _LABELS if stem in labels[place]), None)
        return Pair(f"JPEGImages/{stem}.jpg", place and f"{place}/{stem}.png")

    def labelled(stems: Iterable[str]) -> list[Pair]:
        # If the label map is missing, writing stops at that sample, or leaves it out with --skip-bad.
        return [Pair(p.image, p.label or f"{_LABELS[0]}/{Path(p.image).stem}.png") for p in map(pair, stems)]

    def train() -> list[Pair]:
        if not aug:
            return labelled(_ids(root / _SETS / "train.txt"))
        for name in _AUGMENTED:
            if (root / _SETS / name).is_file():
                return labelled(_ids(root / _SETS / name))
        held_out = set(_ids(root / _SETS / "val.txt"))
        stems = {*labels["SegmentationClassAug"], *_ids(root / _SETS / "train.txt")}
        return labelled(sorted(stems - held_out))

    def find(line: Pair) -> Pair:
        return pair(Path(line.image).stem)

    with_labels, without = split_train(options.split_labelled, options.split_unlabelled, train, find)
    if options.split_val is None:
        val = labelled(_ids(root / _SETS / "val.txt"))
    else:
        val = labelled(Path(line.image).stem for line in read_split(options.split_val))
    if all_images:
        taken = {p.image for p in (*with_labels, *without, *val)}
        without += [p for p in (Pair(f"JPEGImages/{stem}.jpg") for stem in sorted(images)) if p.image not in taken]
    listing = hold_out_dev({"labelled": with_labels, "unlabelled": without, "val": val}, options)
    return ImageFiles("voc", root, listing, options, built_in_classes("voc"), key_root="JPEGImages/")


def _stems(path: Path, ending: str) -> set[str]:
    return {file.stem for file in path.iterdir() if file.suffix == ending} if path.is_dir() else set()


def _ids(path: Path) -> list[str]:
    """The first column of a list: an id, or (as DeepLab's and UniMatch's lists have it) the path of an image."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it is part of VOC2012") from None
    return [Path(line.split()[0]).stem for line in lines if line.strip()]
