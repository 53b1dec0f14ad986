"""COCO JSON: instances or panoptic, as COCO itself, CVAT, Roboflow and Label Studio lay it out.

Categories become classes in the order of their ids, for instances after a class for the background.
`coco_json.py` reads a JSON, `coco_layout.py` finds JSONs and images, `annotations.py` draws.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.sources.annotated_classes import (
    BACKGROUND,
    Annotated,
    annotated_classes,
    drawn_options,
)
from maskmatch_scale.data.writing.sources.annotations import AnnotationRule, need_pycocotools, pack, pack_panoptic
from maskmatch_scale.data.writing.sources.classes import IGNORE
from maskmatch_scale.data.writing.sources.coco_json import (
    CocoFile,
    CocoImage,
    read_coco,
    refuse_boxes_alone,
    refuse_crowds_alone,
    regions_of,
    segments_of,
)
from maskmatch_scale.data.writing.sources.coco_layout import (
    Layout,
    find_jsons,
    place_images,
    segments_folder,
    subset_of,
)
from maskmatch_scale.data.writing.sources.image_files import ImageFiles
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.data.writing.sources.splits import Pair, hold_out, read_split, split_train


def coco(
    source: Path,
    options: Options,
    *,
    images: Path | None = None,
    panoptic: bool = False,
    segments: Path | None = None,
    background: str | None = None,
    others: str = "ignore",
    unannotated: str = BACKGROUND,
    crowds: str | None = None,
) -> ImageFiles:
    """List the samples of COCO JSONs.

    Args:
        source: a JSON, or a folder of them and of images.
        options: `classes` chooses and orders categories; `split_*` files name samples by their image.
        images: folder that `file_name` is relative to; None: found.
        panoptic: of a folder, take `panoptic_*.json` in place of `instances_*.json`.
        segments: folder of the PNGs of a panoptic JSON; None: found.
        background: name of the class of pixels that no annotation covers, or `ignore`; None: `background` for
            instances. A panoptic JSON takes none: there, pixels of no segment are ignored.
        others: `ignore` or `background`: what annotations become whose category is not in `options.classes`.
        unannotated: `background` or `unlabelled`: what images are that the JSON names, but has no annotation of.
        crowds: `ignore` or `objects`: what annotations become that are marked by `iscrowd`. None: ignored, and refused
            if most are marked so.

    Raises:
        DataError: a JSON cannot be used, images are not found, or options do not go together.
    """
    need_pycocotools("shards write coco")
    if unannotated not in (BACKGROUND, "unlabelled"):
        raise DataError(f"--unannotated {unannotated}: background or unlabelled")
    if crowds not in (None, "ignore", "objects"):
        raise DataError(f"--crowds {crowds}: ignore or objects")
    notes: list[str] = []
    files = [read_coco(path, notes, crowds_are_objects=crowds == "objects") for path in find_jsons(source, panoptic)]
    if len({file.panoptic for file in files if any(file.annotations.values())}) > 1:
        raise DataError(f"{source}: some JSONs are panoptic, others are not; give one of them")
    of_segments = any(file.panoptic for file in files)
    _check(files, source, of_segments, background)
    if crowds is None:
        refuse_crowds_alone(files)
    if not of_segments:
        background = background or BACKGROUND
    names = list(dict.fromkeys(name for file in files for name in file.categories.values()))
    counts = sum((file.counts() for file in files), Counter[str]())
    classes = annotated_classes(names, counts, options.classes, background, others, str(source), notes)
    layout = place_images(source, files, images, notes)
    pairs = _Pairs(files, layout, classes, None if unannotated == "unlabelled" else classes.rest, segments)
    found = [pairs.of_file(file, number) for number, file in enumerate(files)]
    notes += pairs.said()
    listing = _streams(files, found, layout.others, options, notes)
    if options.split_labelled or options.split_unlabelled or options.split_val:
        listing = _split(listing, options)
    for name, amount in (("val", options.val), ("dev", options.dev)):
        if amount is not None:
            if listing.get(name):
                raise DataError(f"--{name} {amount}: there are {len(listing[name])} samples in {name} already")
            listing["labelled"], listing[name] = hold_out(listing["labelled"], amount, options.split_seed, f"--{name}")
    return ImageFiles(
        "coco",
        layout.root,
        listing,
        drawn_options(options),
        classes.classes,
        key_root=layout.key_root,
        notes=tuple(notes),
        annotations=AnnotationRule(str(pairs.segments_root)),
    )


def _check(files: Sequence[CocoFile], source: Path, of_segments: bool, background: str | None) -> None:
    if not any(any(file.annotations.values()) for file in files):
        raise DataError(f"{source}: no annotation in it; images alone are written by `shards write folder`")
    refuse_boxes_alone(files)
    if of_segments and background is not None:
        raise DataError(f"--background {background}: pixels of no segment of a panoptic JSON are ignored")


@dataclass
class _Pairs:
    """From the images of JSONs to samples; counts what the user should know."""

    files: Sequence[CocoFile]
    layout: Layout
    classes: Annotated
    unannotated: int | None
    """Value of all pixels of an image without annotations; None: it is unlabelled."""
    segments: Path | None

    def __post_init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.folders = [segments_folder(file.path, self.segments) if file.panoptic else None for file in self.files]
        given = [folder for folder in self.folders if folder is not None]
        self.segments_root = Path(os.path.commonpath(given)) if given else Path()

    def of_file(self, file: CocoFile, number: int) -> list[Pair]:
        """The samples of a JSON. Without any annotation in it, they are unlabelled."""
        paths = self.layout.paths[number]
        if not any(file.annotations.values()):
            self.found["in files of none"] += len(paths)
            return [Pair(path) for path in paths]
        return [Pair(path, self._label(file, image, number)) for path, image in zip(paths, file.images, strict=True)]

    def _label(self, file: CocoFile, image: CocoImage, number: int) -> str | None:
        if file.panoptic:
            packed = segments_of(file, image, self.classes.values, IGNORE, self.found)
            if packed is None:
                self.found["without a PNG"] += 1
                return None
            folder = self.folders[number]
            assert folder is not None
            return pack_panoptic((folder.relative_to(self.segments_root) / packed[0]).as_posix(), packed[1])
        if not file.annotations[image.id]:
            self.found["unannotated"] += 1
            if self.unannotated is None:
                return None
        regions = regions_of(file, image, self.classes.values, IGNORE, self.found)
        return pack((image.height, image.width), self.classes.rest, regions)

    def said(self) -> list[str]:
        """What was counted, a line each."""
        as_what = "unlabelled"
        if self.unannotated is not None:
            name = "ignored" if self.unannotated == IGNORE else f"all {self.classes.classes.names[self.unannotated]}"
            as_what = f"labelled as {name}; --unannotated unlabelled makes them unlabelled"
        lines = {
            "unannotated": f"images have no annotation: {as_what}",
            "in files of none": "images are unlabelled: they are in JSONs without any annotation",
            "without a PNG": "images have no panoptic annotation: unlabelled",
            "crowds": "annotations of crowds (iscrowd) become ignored pixels, where no object lies on them; "
            "--crowds objects makes them objects",
            "boxes": "annotations have a box, but no segmentation: their boxes become ignored pixels",
            "thin": "outlines of fewer than three points cover nothing: left out",
        }
        return [f"{self.found[what]} {line}" for what, line in lines.items() if self.found[what]]


def _streams(
    files: Sequence[CocoFile],
    found: Sequence[Sequence[Pair]],
    others: Sequence[str],
    options: Options,
    notes: list[str],
) -> dict[str, list[Pair]]:
    """The streams by the names of the JSONs' subsets, and other images."""
    kinds = [subset_of(file.path) for file in files] if len(files) > 1 else ["train"]
    annotated = {kind for kind, pairs in zip(kinds, found, strict=True) if any(pair.label for pair in pairs)}
    streams = {"train": "labelled", "valid": "dev" if "test" in annotated else "val", "test": "val"}
    listing: dict[str, list[Pair]] = {"labelled": [], "unlabelled": [], "dev": [], "val": []}
    for file, kind, pairs in zip(files, kinds, found, strict=True):
        for pair in pairs:
            listing[streams[kind] if pair.label is not None else "unlabelled"].append(pair)
        if len(files) > 1:
            notes.append(f"{file.path}: {sum(pair.label is not None for pair in pairs)} samples of {streams[kind]}")
    if others:
        notes.append(f"{len(others)} image files are named by no JSON, such as {others[0]}: unlabelled")
    listing["unlabelled"] += [Pair(path) for path in others]
    return listing


def _split(listing: Mapping[str, Sequence[Pair]], options: Options) -> dict[str, list[Pair]]:
    """The streams that split files ask for; they name images by path or by name."""
    by_path = {pair.image: pair for pairs in listing.values() for pair in pairs}
    by_name: dict[str, list[Pair]] = {}
    for pair in by_path.values():
        by_name.setdefault(Path(pair.image).name, []).append(pair)

    def find(line: Pair) -> Pair:
        if line.image in by_path:
            return by_path[line.image]
        named = by_name.get(Path(line.image).name, [])
        if len(named) > 1:
            some = f"such as {named[0].image} and {named[1].image}"
            raise DataError(f"{line.image} of a split file: {len(named)} images have this name, {some}; give the path")
        if not named:
            raise DataError(f"{line.image} of a split file is no image of the data set")
        return named[0]

    train = [*listing["labelled"], *listing["unlabelled"]]
    labelled, unlabelled = split_train(options.split_labelled, options.split_unlabelled, lambda: train, find)
    streams = {**listing, "labelled": labelled, "unlabelled": unlabelled}
    if options.split_val is not None:
        streams["val"] = [find(line) for line in read_split(options.split_val)]
        if lacking := [pair.image for pair in streams["val"] if pair.label is None]:
            raise DataError(f"{options.split_val}: {lacking[0]} has no annotation, but held-out samples need one")
        held = {pair.image for pair in streams["val"]}
        for name in ("labelled", "unlabelled"):
            streams[name] = [pair for pair in streams[name] if pair.image not in held]
    return {name: list(pairs) for name, pairs in streams.items()}
