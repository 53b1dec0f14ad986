"""ADE20K as in the scene parsing challenge (`ADEChallengeData2016`): 150 classes.

`images/training` is `labelled`, `images/validation` is `val`. In `annotations` 0 is what belongs to no class, and is
ignored; value v is class v - 1.
"""

from __future__ import annotations

from pathlib import Path

from maskmatch_scale.data.writing.sources.classes import built_in_classes
from maskmatch_scale.data.writing.sources.image_files import ImageFiles
from maskmatch_scale.data.writing.sources.listing import folder, images_below
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.data.writing.sources.splits import Pair, hold_out_dev, read_split, split_train


def ade20k(root: Path, options: Options, *, converted: bool = False) -> ImageFiles:
    """List the samples of ADE20K.

    Args:
        root: `ADEChallengeData2016`, or the folder it lies in.
        options: `split_*` files name samples by their image.
        converted: label maps hold class values already, 0 to 149 and 255, as in UniMatch-V2's download.
    """
    root = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    folder(root / "annotations", "it is part of ADEChallengeData2016, which SOURCE must name")

    def find(line: Pair) -> Pair:
        image = Path(line.image)
        return Pair(line.image, str(Path("annotations", *image.parts[1:-1], f"{image.stem}.png")))

    def images(part: str) -> list[Pair]:
        folder(root / "images" / part, "it is part of ADEChallengeData2016")
        return [find(Pair(path)) for path in images_below(root, f"images/{part}")]

    with_labels, without = split_train(
        options.split_labelled, options.split_unlabelled, lambda: images("training"), find
    )
    val = [find(line) for line in read_split(options.split_val)] if options.split_val else images("validation")
    listing = hold_out_dev({"labelled": with_labels, "unlabelled": without, "val": val}, options)
    ready = ("",) if converted else ()
    return ImageFiles("ade20k", root, listing, options, built_in_classes("ade20k"), ready, "images/[^/]+/")
