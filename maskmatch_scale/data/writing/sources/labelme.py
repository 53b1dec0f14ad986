"""A folder that was annotated with labelme: images, and beside each one a `.json` of its name.

Shapes become regions of the class that their label names. The pixels of `imageData`, if a JSON holds them, are not
read.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.opening import MOST_WHOLE_PIXELS
from maskmatch_scale.data.writing.sources.annotated_classes import (
    BACKGROUND,
    Annotated,
    drawn_options,
    some,
    with_background,
    with_values,
    without_ignored,
)
from maskmatch_scale.data.writing.sources.annotations import (
    AnnotationRule,
    Region,
    has_area,
    need_pycocotools,
    outline_fault,
    pack,
)
from maskmatch_scale.data.writing.sources.classes import IGNORE, load_classes
from maskmatch_scale.data.writing.sources.found_instead import left_out_formats
from maskmatch_scale.data.writing.sources.image_files import ImageFiles
from maskmatch_scale.data.writing.sources.listing import files_below, folder, is_image
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.data.writing.sources.splits import Pair, hold_out

_IGNORED_LABEL = "__ignore__"
_OWN_BACKGROUND = "_background_"
"""Names in labelme's own `labels.txt`."""
_CORNERS_OF_A_CIRCLE = 64


def labelme(
    root: Path, options: Options, *, background: str | None = None, unannotated: str = BACKGROUND
) -> ImageFiles:
    """List the samples of a folder.

    Args:
        root: the folder; folders in it are looked through too.
        options: `classes` is needed, and no split files are taken; `unknown_as_ignore` ignores the shapes of labels
            that are no class.
        background: name of the class of pixels that no shape covers, or `ignore`; None: `_background_` if it is one
            of the classes, otherwise `background`.
        unannotated: `background` or `unlabelled`: what images are whose JSON has no shape.

    Raises:
        DataError: no JSON of labelme, one that cannot be used, or labels that are no class.
    """
    need_pycocotools("shards write labelme")
    if unannotated not in (BACKGROUND, "unlabelled"):
        raise DataError(f"--unannotated {unannotated}: background or unlabelled")
    if options.split_labelled or options.split_unlabelled or options.split_val:
        raise DataError("--split-…: labelme takes --dev and --val")
    notes: list[str] = []
    files = files_below(folder(root, "give the folder of the images and of labelme's .json"))
    notes += left_out_formats(files)
    images = [path for path in files if is_image(path)]
    found = _jsons(root, files, images, notes)
    labels = Counter(str(shape["label"]) for content in found.values() for shape in content["shapes"])
    classes = _classes(root, labels, options, background, notes)
    pairs, left_out = [], Counter[str]()
    empty = 0
    for image in images:
        content = found.get(_stem(image))
        if content is not None and not content["shapes"]:
            empty += 1
            content = None if unannotated == "unlabelled" else content
        pairs.append(Pair(image, None if content is None else _packed(root / image, content, classes, left_out)))
    notes += _counted(pairs, empty, unannotated, left_out)
    listing = {
        "labelled": [pair for pair in pairs if pair.label is not None],
        "unlabelled": [pair for pair in pairs if pair.label is None],
    }
    for name, amount in (("val", options.val), ("dev", options.dev)):
        listing["labelled"], listing[name] = hold_out(listing["labelled"], amount, options.split_seed, f"--{name}")
    rule = AnnotationRule()
    options = drawn_options(options)
    return ImageFiles("labelme", root, listing, options, classes.classes, notes=tuple(notes), annotations=rule)


def _jsons(root: Path, files: Sequence[str], images: Sequence[str], notes: list[str]) -> dict[str, dict[str, Any]]:
    """What the JSONs beside images hold, without pixels, by their paths without the ending."""
    stems = Counter(map(_stem, images))
    found, others, alone = {}, [], []
    for path in files:
        if not path.lower().endswith(".json"):
            continue
        if not stems[_stem(path)]:
            alone.append(path)
        elif stems[_stem(path)] > 1:
            raise DataError(f"{root / path}: {stems[_stem(path)]} images have its name; leave one there")
        elif (content := _content(root / path)) is None:
            others.append(path)
        else:
            found[_stem(path)] = content
    if not found:
        what = f"; {len(alone)} .json files have the name of no image, such as {alone[0]}" if alone else ""
        if any((content := _parsed(root / path)) and "annotations" in content for path in alone[:1]):
            what = f"; {alone[0]} is a COCO JSON: `maskmatch shards write coco`"
        raise DataError(f"{root}: no .json of labelme's beside an image{what}")
    for paths, what in ((alone, "have the name of no image"), (others, "are not labelme's: they have no `shapes`")):
        if paths:
            notes.append(f"{len(paths)} .json files {what}, such as {paths[0]}: left out")
    return found


def _parsed(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    return content if isinstance(content, dict) else {}


def _content(path: Path) -> dict[str, Any] | None:
    """Size and shapes of a JSON; None if it is not labelme's."""
    content = _parsed(path)
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        return None
    size = content.get("imageHeight"), content.get("imageWidth")
    if not all(type(side) is int and side > 0 for side in size) or size[0] * size[1] > MOST_WHOLE_PIXELS:  # type: ignore[operator]
        raise DataError(f"{path}: imageHeight {size[0]!r} and imageWidth {size[1]!r} are no size in px")
    for number, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise DataError(f"{path}: shape {number} has no label")
    return {"path": path, "size": size, "shapes": shapes}


def _classes(root: Path, labels: Counter[str], options: Options, background: str | None, notes: list[str]) -> Annotated:
    counted = some([f"{name} ({count})" for name, count in labels.most_common()], 30)
    if options.classes is None:
        raise DataError(f"{root}: --classes FILE names the classes, one a line; labels found: {counted or 'none'}")
    classes = without_ignored(load_classes(options.classes))
    if background is None:
        background = _OWN_BACKGROUND if _OWN_BACKGROUND in classes.names else BACKGROUND
    rest = IGNORE
    if background.lower() != "ignore":
        classes, rest = with_background(classes, background)
    values = {name: number for number, name in enumerate(classes.names)} | {_IGNORED_LABEL: IGNORE}
    unknown = [f"{name} ({count})" for name, count in labels.most_common() if name not in values]
    if unknown and not options.unknown_as_ignore:
        what = f"labels that are not in --classes {options.classes}: {some(unknown, 30)}"
        raise DataError(f"{root}: {what}; add them there, or give --unknown-as-ignore")
    if unknown:
        notes.append(f"shapes of labels that are no class become ignored pixels: {some(unknown, 30)}")
    if unused := [name for name in classes.names if not labels[name] and values[name] != rest]:
        also = "" if rest == IGNORE else f"; pixels of no shape are {classes.names[rest]!r} (--background NAME)"
        notes.append(f"classes without a shape, which will never occur: {some(unused)}{also}")
    return Annotated(with_values(classes), {**dict.fromkeys(labels, IGNORE), **values}, rest)


def _packed(image: Path, content: Mapping[str, Any], classes: Annotated, left_out: Counter[str]) -> str:
    return pack(content["size"], classes.rest, _regions(content, classes.values, left_out))


def _regions(content: Mapping[str, Any], values: Mapping[str, int], left_out: Counter[str]) -> Iterator[Region]:
    for number, shape in enumerate(content["shapes"]):
        kind, where = str(shape.get("shape_type") or "polygon"), f"{content['path']}: shape {number} ({shape['label']})"
        points = _points(shape.get("points"), where)
        drawn: Any = None
        if kind in ("polygon", "oriented_rectangle") or (kind == "rectangle" and len(points) == 8):
            drawn = [points] if has_area(points) else None
        elif kind == "rectangle" and len(points) == 4:
            x, y, far_x, far_y = points
            drawn = [[x, y, far_x, y, far_x, far_y, x, far_y]]
        elif kind == "circle" and len(points) == 4:
            drawn = [_circle(points)]
        elif kind == "mask" and len(points) == 4:
            drawn = _mask(shape.get("mask"), points, content["size"], where)
        if drawn is None:
            left_out[kind] += 1
        else:
            yield Region(values[shape["label"]], drawn, f"shape {number}")


def _points(points: Any, where: str) -> list[float]:
    """`[x, y, x, y, …]` of labelme's `[[x, y], …]`."""
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise DataError(f"{where}: points are no list of [x, y]")
    flat = [number for point in points for number in point]
    if fault := outline_fault(flat):
        raise DataError(f"{where}: points: {fault}")
    return flat


def _circle(points: Sequence[float]) -> list[float]:
    """The outline of a circle, of its centre and a point on it."""
    x, y, on_x, on_y = points
    radius = math.hypot(on_x - x, on_y - y)
    angles = [2 * math.pi * corner / _CORNERS_OF_A_CIRCLE for corner in range(_CORNERS_OF_A_CIRCLE)]
    return [round(number, 3) for a in angles for number in (x + radius * math.cos(a), y + radius * math.sin(a))]


def _mask(encoded: Any, points: Sequence[float], size: tuple[int, int], where: str) -> Mapping[str, object]:
    """Run lengths of a mask, which labelme keeps as a PNG of its box. The first point is the box's upper left pixel."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
            mask = np.asarray(image.convert("L")) > 0
    except Exception as error:  # Pillow's decoders raise nearly any exception for damaged files
        raise DataError(f"{where}: its mask is no PNG ({error})") from None
    left, top = (round(number) for number in points[:2])
    whole = np.zeros(size, np.bool_)
    bottom, right = min(size[0], top + mask.shape[0]), min(size[1], left + mask.shape[1])
    if min(left, top) < 0 or bottom <= top or right <= left:
        raise DataError(f"{where}: its mask lies outside of the image")
    whole[top:bottom, left:right] = mask[: bottom - top, : right - left]
    pixels = whole.T.ravel()
    edges = np.concatenate([[0], np.flatnonzero(np.diff(pixels)) + 1, [pixels.size]])
    counts = np.diff(edges).tolist()
    return {"size": list(size), "counts": [0, *counts] if pixels[0] else counts}


def _counted(pairs: Sequence[Pair], empty: int, unannotated: str, left_out: Counter[str]) -> list[str]:
    """What the user should know of the samples, a line each."""
    notes = []
    if empty:
        what = "are unlabelled" if unannotated == "unlabelled" else "are labelled as all background"
        other = "" if unannotated == "unlabelled" else "; --unannotated unlabelled makes them unlabelled"
        notes.append(f"{empty} images whose .json has no shape {what}{other}")
    without = sum(pair.label is None for pair in pairs) - (empty if unannotated == "unlabelled" else 0)
    if without:
        notes.append(f"{without} of {len(pairs)} images have no .json: unlabelled")
    if left_out:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        notes.append(f"{left_out.total()} shapes have no area and are left out: {told}")
    return notes


def _stem(path: str) -> str:
    return path[: path.rfind(".")]
