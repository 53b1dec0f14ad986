"""COCO-Stuff 164k with the label maps of `stuffthingmaps_trainval2017.zip`: 171 classes.

`train2017` is `labelled`, `val2017` is `val`. A value in a label map is an id from 1 to 182, minus 1. Of the 182 ids 11
are never used; the others become the 171 classes of mmsegmentation, and 255 is ignored. Where a label map is missing,
mmsegmentation's converted `*_labelTrainIds.png` is taken.

UniMatch's COCO has other label maps (`masks`, 81 classes). Its split files choose the same images here, but for its own
label maps use the source `folder` with the classes `coco`.
"""

from __future__ import annotations

from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.sources.classes import built_in_classes
from maskmatch_scale.data.writing.sources.image_files import ImageFiles
from maskmatch_scale.data.writing.sources.listing import files_below, folder, images_below
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.data.writing.sources.splits import Pair, hold_out_dev, read_split, split_train

_PLACES = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations", "labels")
_TRAIN_IDS = "_labelTrainIds.png"


def coco_stuff(root: Path, options: Options, *, unlabeled2017: bool = False) -> ImageFiles:
    """List the samples of COCO-Stuff.

    Args:
        root: the folder of `images/train2017` (or `train2017`), and of `train2017` with the label maps below one of
            `stuffthingmaps`, `stuffthingmaps_trainval2017`, `annotations` or `labels`.
        options: `split_*` files name samples by their image.
        unlabeled2017: make the images of `unlabeled2017` `unlabelled`.
    """
    folder(root, "name the folder of images and stuffthingmaps")
    start = "images/" if (root / "images").is_dir() else ""
    place = next((place for place in _PLACES if (root / place / "train2017").is_dir()), None)
    if place is None:
        what = f"no label maps: no train2017 in one of {', '.join(_PLACES)}"
        raise DataError(f"{root}: {what}; they come with stuffthingmaps_trainval2017.zip")
    labels = set(files_below(root, place))

    def find(line: Pair) -> Pair:
        part, name = Path(line.image).parent.name, Path(line.image).stem
        label, converted = f"{place}/{part}/{name}.png", f"{place}/{part}/{name}{_TRAIN_IDS}"
        if label not in labels and converted in labels:
            label = converted
        return Pair(f"{start}{part}/{Path(line.image).name}", label)

    def images(part: str) -> list[Pair]:
        folder(root / start / part, "it is part of COCO 2017")
        return [find(Pair(path)) for path in images_below(root, f"{start}{part}")]

    with_labels, without = split_train(
        options.split_labelled, options.split_unlabelled, lambda: images("train2017"), find
    )
    if unlabeled2017:
        without += [Pair(pair.image) for pair in images("unlabeled2017")]
    val = [find(line) for line in read_split(options.split_val)] if options.split_val else images("val2017")
    listing = hold_out_dev({"labelled": with_labels, "unlabelled": without, "val": val}, options)
    own = built_in_classes("coco_stuff")
    return ImageFiles("coco-stuff", root, listing, options, own, (_TRAIN_IDS,), "(images/)?[^/]+/")
