"""Data sets in the layouts that docs/writing.md speaks of, a few tiny images each."""

from __future__ import annotations

from pathlib import Path

from tests.data.writing.sources.conftest import Tree

_NAMES = ("ground", "crack", "plant")


def folders(folder: Path) -> None:
    """`photos`, laid out in the three ways of the section on folders, and `names.txt`."""
    tree = Tree(folder)
    tree.text("names.txt", *_NAMES)
    for number in range(10):
        below = {7: "val/", 8: "test/"}.get(number, "")
        tree.image(f"photos/images/{below}{number}.jpg")
        tree.image(f"photos/rgb/{number}.jpg")
        tree.label(f"photos/labels/{below}{number}.png", number % 3)
        tree.label(f"photos/gt/{number}_mask.png", number % 3)


def listed(folder: Path) -> None:
    """`scans.csv`, whose lines are those of the page, and `names.txt`."""
    tree = Tree(folder)
    tree.text("names.txt", *_NAMES)
    for name in "abcd":
        tree.image(f"scans/{name}.jpg")
    for number, name in enumerate("abd"):
        tree.label(f"masks/{name}.png", number)
    lines = ("scans/a.jpg,masks/a.png,labelled", "scans/b.jpg,masks/b.png,val", "scans/c.jpg,,unlabelled")
    tree.text("scans.csv", "image,label,stream", *lines, "scans/d.jpg,masks/d.png,")


def voc(folder: Path) -> None:
    """`VOCdevkit/VOC2012`, and UniMatch's split of it."""
    root, names = "VOCdevkit/VOC2012", [f"2007_{number:06d}" for number in range(8)]
    tree = Tree(folder)
    for number, name in enumerate(names):
        tree.image(f"{root}/JPEGImages/{name}.jpg")
        tree.label(f"{root}/SegmentationClassAug/{name}.png", number)
        if number < 5:
            tree.label(f"{root}/SegmentationClass/{name}.png", number, mode="P")
    for part, some in (("train", names[:3]), ("val", names[3:5]), ("trainaug", [*names[:3], names[5]])):
        tree.text(f"{root}/ImageSets/Segmentation/{part}.txt", *some)
    pairs = [f"JPEGImages/{name}.jpg SegmentationClass/{name}.png" for name in names]
    tree.text("UniMatch/splits/pascal/92/labeled.txt", *pairs[:2])
    tree.text("UniMatch/splits/pascal/92/unlabeled.txt", pairs[2], pairs[5])


def cityscapes(folder: Path) -> None:
    """`cityscapes`, with images of `train_extra`; `two.txt` and `two.yaml`."""
    tree = Tree(folder)
    for part in ("train", "val"):
        for number in range(2):
            name = f"{part}/ulm/ulm_{number:06d}_000019"
            tree.image(f"cityscapes/leftImg8bit/{name}_leftImg8bit.png")
            tree.label(f"cityscapes/gtFine/{name}_gtFine_labelIds.png", [[7, 26] * 6] * 8)
    tree.image("cityscapes/leftImg8bit/train_extra/bonn/bonn_000000_000019_leftImg8bit.png")
    tree.text("two.txt", "ground", "vehicle")
    tree.text("two.yaml", "7: ground", "26: vehicle")


def ade20k(folder: Path) -> None:
    """`ADEChallengeData2016`."""
    tree, root = Tree(folder), "ADEChallengeData2016"
    for part, count in (("training", 4), ("validation", 2)):
        for number in range(count):
            tree.image(f"{root}/images/{part}/ADE_{part}_{number:08d}.jpg")
            tree.label(f"{root}/annotations/{part}/ADE_{part}_{number:08d}.png", number)


def coco(folder: Path) -> None:
    """`coco`: images, COCO-Stuff's label maps, UniMatch's, and its split."""
    tree = Tree(folder)
    for part in ("train2017", "val2017", "unlabeled2017"):
        for number in range(2):
            tree.image(f"coco/images/{part}/{number:012d}.jpg")
            if part != "unlabeled2017":
                tree.label(f"coco/stuffthingmaps/{part}/{number:012d}.png", [[0, 255] * 6] * 8)
                tree.label(f"coco/masks/{number:012d}.png", number)
    train = [f"images/train2017/{number:012d}.jpg masks/{number:012d}.png" for number in range(2)]
    tree.text("UniMatch/splits/coco/1_512/labeled.txt", train[0])
    tree.text("UniMatch/splits/coco/1_512/unlabeled.txt", train[1])
    tree.text("UniMatch/splits/coco/val.txt", "images/val2017/000000000000.jpg masks/000000000000.png")


LAYOUTS = (folders, listed, voc, cityscapes, ade20k, coco)
