"""Cityscapes: `leftImg8bit/{train,val,train_extra}/CITY/*_leftImg8bit.png`, `gtFine/{train,val}/CITY/*_gtFine_*.png`.

`train` is `labelled`, `val` is `val`. Label maps are `_labelIds.png`, whose ids become the 19 train ids, or where there
is none, `_labelTrainIds.png`, which hold them already (UniMatch's download has only these).
"""

from __future__ import annotations

from pathlib import Path

from maskmatch_scale.data.writing.sources.classes import built_in_classes
from maskmatch_scale.data.writing.sources.image_files import ImageFiles
from maskmatch_scale.data.writing.sources.listing import files_below, folder
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.data.writing.sources.splits import Pair, hold_out_dev, read_split, split_train

_IMAGE = "_leftImg8bit.png"
_IDS, _TRAIN_IDS = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


def cityscapes(root: Path, options: Options, *, train_extra: bool = False) -> ImageFiles:
    """List the samples of Cityscapes.

    Args:
        root: the folder of `leftImg8bit` and `gtFine`.
        options: `split_*` files name samples by their image; `id_map` is of label ids.
        train_extra: make the images of `leftImg8bit/train_extra` `unlabelled`.
    """
    folder(root / "leftImg8bit", "it comes with leftImg8bit_trainvaltest.zip")
    folder(root / "gtFine", "it comes with gtFine_trainvaltest.zip")
    labels = set(files_below(root, "gtFine"))

    def find(line: Pair) -> Pair:
        start = f"gtFine/{line.image.removeprefix('leftImg8bit/').removesuffix(_IMAGE)}"
        end = _TRAIN_IDS if start + _IDS not in labels and start + _TRAIN_IDS in labels else _IDS
        return Pair(line.image, start + end)

    def images(part: str) -> list[Pair]:
        where = f"leftImg8bit/{part}"
        folder(root / where, "it is part of Cityscapes")
        return [Pair(path) for path in files_below(root, where) if path.endswith(_IMAGE)]

    def train() -> list[Pair]:
        return [find(pair) for pair in images("train")]

    with_labels, without = split_train(options.split_labelled, options.split_unlabelled, train, find)
    if train_extra:
        taken = {pair.image for pair in without}
        without += [pair for pair in images("train_extra") if pair.image not in taken]
    val = [find(pair) for pair in (read_split(options.split_val) if options.split_val else images("val"))]
    listing = hold_out_dev({"labelled": with_labels, "unlabelled": without, "val": val}, options)
    own = built_in_classes("cityscapes")
    return ImageFiles("cityscapes", root, listing, options, own, (_TRAIN_IDS,), "leftImg8bit/[^/]+/[^/]+/")
