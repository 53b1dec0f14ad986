"""One JSON of COCO's format, read and checked: its images, categories and annotations.

The format is that of https://cocodataset.org/#format-data, as CVAT, Roboflow and Label Studio write it. The file is
read whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.opening import MOST_WHOLE_PIXELS
from maskmatch_scale.data.writing.sources.annotations import Region, has_area, outline_fault

_NO_SEGMENTATION = "no annotation of it has a segmentation: there are boxes or keypoints, and no label map is in those"


class CocoImage(NamedTuple):
    """An image that the JSON names; `height` and `width` in px."""

    id: Any
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoFile:
    """What a JSON holds.

    Attributes:
        path: of the JSON.
        images: in its order.
        categories: names by id, in the order of ids.
        annotations: by id of the image, in its order: of a panoptic JSON one for an image.
        panoptic: whether annotations are `segments_info` of PNGs.
    """

    path: Path
    images: Sequence[CocoImage]
    categories: Mapping[int, str]
    annotations: Mapping[Any, Sequence[Mapping[str, Any]]]
    panoptic: bool

    def objects(self) -> Iterator[Mapping[str, Any]]:
        """All annotations, or of a panoptic JSON all segments."""
        rows = (row for rows in self.annotations.values() for row in rows)
        return (segment for row in rows for segment in row["segments_info"]) if self.panoptic else rows

    def counts(self) -> Counter[str]:
        """How many annotations each category has."""
        return Counter(self.categories[row["category_id"]] for row in self.objects())


def read_coco(path: Path, notes: list[str], *, crowds_are_objects: bool = False) -> CocoFile:
    """Read a JSON and check it.

    Args:
        path: of the JSON.
        notes: what the user should know is added.
        crowds_are_objects: take no notice of `iscrowd`.

    Raises:
        DataError: it cannot be read, is no COCO JSON, or one of its entries cannot be used; names the entry.
    """
    content = _content(path)
    images = [_image(row, path) for row in content["images"]]
    _unique((image.id for image in images), path, "images have the id")
    _unique((image.file_name for image in images), path, "images have the file_name")
    by_image: dict[Any, list[Mapping[str, Any]]] = {image.id: [] for image in images}
    rows = content.get("annotations") or []
    if not isinstance(rows, list):
        raise DataError(f"{path}: its `annotations` are no list")
    used: set[Any] = set()
    panoptic = any("segments_info" in row for row in rows[:1] if isinstance(row, dict))
    for row in rows:
        if _id(row, "image_id") not in by_image:
            raise DataError(f"{path}: {_named(row)}: its image_id is that of no image of the file")
        by_image[row["image_id"]].append(row)
        segments = row.get("segments_info") if panoptic else [row]
        if not isinstance(segments, list) or not all(isinstance(part, dict) for part in segments):
            raise DataError(f"{path}: {_named(row)}: segments_info is no list of objects")
        used.update(_id(part, "category_id") for part in segments)
        for part in segments:
            # A text "0" would count as true, and its object as ignored.
            if part.get("iscrowd") not in (None, 0, 1):
                raise DataError(f"{path}: {_named(row)}: iscrowd {part['iscrowd']!r} is neither 0 nor 1")
            if crowds_are_objects:
                part["iscrowd"] = 0
    categories = _categories(content.get("categories") or [], used, path, notes)
    if unknown := sorted(used - set(categories), key=str):
        raise DataError(f"{path}: an annotation has the category_id {unknown[0]!r}, which is no category of the file")
    return CocoFile(path, images, categories, by_image, panoptic)


def regions_of(
    file: CocoFile, image: CocoImage, values: Mapping[str, int], ignore: int, found: Counter[str]
) -> Iterator[Region]:
    """The regions of an image.

    A crowd is ignored where no object lies on it, and so is the box of an annotation that has no segmentation.

    Args:
        file: not a panoptic one.
        image: of the file.
        values: class value, or `ignore`, by category.
        ignore: the value of ignored pixels.
        found: `crowds`, `boxes` and `thin` are counted in it: the latter are outlines of fewer than three points, which
            cover nothing and are left out.

    Raises:
        DataError: an annotation cannot be drawn; names it.
    """
    for row in file.annotations[image.id]:
        name, shape = _named(row), row.get("segmentation")
        if not shape:
            found["boxes"] += 1
            yield Region(ignore, [_box(row, file.path)], name, below=True)
            continue
        if isinstance(shape, list):
            for points in shape:
                if fault := outline_fault(points):
                    raise DataError(f"{file.path}: {name}: segmentation: {fault}")
            kept = [points for points in shape if has_area(points)]
            found["thin"] += len(shape) - len(kept)
            if not kept:
                continue
            shape = kept
        elif not isinstance(shape, dict):
            raise DataError(f"{file.path}: {name}: segmentation is neither outlines nor run lengths")
        else:
            shape = {"size": shape.get("size"), "counts": shape.get("counts")}
        crowd = bool(row.get("iscrowd"))
        found["crowds"] += crowd
        yield Region(ignore if crowd else values[file.categories[row["category_id"]]], shape, name, crowd)


def segments_of(
    file: CocoFile, image: CocoImage, values: Mapping[str, int], ignore: int, found: Counter[str]
) -> tuple[str, dict[int, int]] | None:
    """The name of the PNG of an image and the value of each of its segments; None if the file has no annotation of it.

    Arguments as for :func:`regions_of`; `file` is a panoptic one.
    """
    rows = file.annotations[image.id]
    if not rows:
        return None
    if len(rows) > 1 or not isinstance(rows[0].get("file_name"), str):
        raise DataError(f"{file.path}: image {image.file_name}: one panoptic annotation with a file_name is needed")
    segments = {}
    for part in rows[0]["segments_info"]:
        number = part.get("id")
        if type(number) is not int or not 0 < number < 1 << 24:
            raise DataError(f"{file.path}: image {image.file_name}: {number!r} is no id of a segment")
        crowd = bool(part.get("iscrowd"))
        found["crowds"] += crowd
        segments[number] = ignore if crowd else values[file.categories[part["category_id"]]]
    return rows[0]["file_name"], segments


def refuse_crowds_alone(files: Sequence[CocoFile]) -> None:
    """Raise :class:`DataError` if most annotations are marked as crowds: few are in COCO's own data."""
    marks = Counter(bool(row.get("iscrowd")) for file in files for row in file.objects())
    if marks[True] > marks[False]:
        raise DataError(
            f"{files[0].path}: {marks[True]} of {marks.total()} annotations are crowds (iscrowd), which are ignored; "
            "some tools mark every mask so: --crowds objects takes them as objects, --crowds ignore ignores them"
        )


def refuse_boxes_alone(files: Sequence[CocoFile]) -> None:
    """Raise :class:`DataError` for a file whose annotations have no segmentation, not one of them."""
    for file in files:
        rows = [row for rows in file.annotations.values() for row in rows]
        if rows and not file.panoptic and not any(row.get("segmentation") for row in rows):
            raise DataError(f"{file.path}: {_NO_SEGMENTATION}")


def _content(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.load(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if not content["images"]:
            raise DataError(f"{path}: it names no image")
        return content
    what = ""
    if isinstance(content, dict) and "shapes" in content:
        what = "; it is labelme's: `maskmatch shards write labelme FOLDER OUT`"
    elif isinstance(content, list):
        what = "; it is a list: results, or a tool's own format? export as COCO (with the images)"
    raise DataError(f"{path}: not a COCO JSON: it has no `images`{what}")


def _image(row: Any, path: Path) -> CocoImage:
    if _id(row, "id") is None or not isinstance(row.get("file_name"), str):
        raise DataError(f"{path}: image {row if not isinstance(row, dict) else row.get('id')!r} has no id or file_name")
    if not row["file_name"].strip("./\\") or "\0" in row["file_name"]:
        raise DataError(f"{path}: image {row['id']!r}: {row['file_name']!r} is no name of a file")
    height, width = row.get("height"), row.get("width")
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise DataError(f"{path}: image {row['file_name']}: height {height!r} and width {width!r} are no size in px")
    if height * width > MOST_WHOLE_PIXELS:
        raise DataError(
            f"{path}: image {row['file_name']}: {width} × {height} px, more than {MOST_WHOLE_PIXELS} pixels"
        )
    return CocoImage(row["id"], row["file_name"], height, width)


def _categories(rows: Any, used: set[Any], path: Path, notes: list[str]) -> dict[int, str]:
    """Names by id, in the order of ids, without Roboflow's entry for the group of all others."""
    names: dict[int, str] = {}
    groups: set[str] = set()
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict) or type(row.get("id")) is not int or not isinstance(row.get("name"), str):
            raise DataError(f"{path}: category {row!r} has no id (a number) or name")
        if row["id"] in names:
            raise DataError(f"{path}: two categories have the id {row['id']}")
        names[row["id"]] = row["name"]
        if row.get("supercategory") != row["name"]:
            groups.add(str(row.get("supercategory")))
    for number in [number for number, name in names.items() if name in groups and number not in used]:
        note = f"category {names[number]!r} is left out: it names a group of others and has no annotation"
        notes += [] if note in notes else [note]
        del names[number]
    twice = sorted(name for name, count in Counter(names.values()).items() if count > 1)
    if twice:
        notes.append(f"{path}: categories of one name become one class: {', '.join(twice)}")
    return dict(sorted(names.items()))


def _box(row: Mapping[str, Any], path: Path) -> list[float]:
    """The outline of an annotation's box."""
    box = row.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or outline_fault(box):
        raise DataError(f"{path}: {_named(row)}: it has no segmentation, and no bbox that could be ignored instead")
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _unique(values: Iterator[Any], path: Path, what: str) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise DataError(f"{path}: {count} {what} {value!r}")


def _id(row: Any, key: str) -> Any:
    """A number or text of an entry; None if it has none, or the entry is none."""
    value = row.get(key) if isinstance(row, dict) else None
    return value if type(value) in (int, str) else None


def _named(row: Any) -> str:
    return f"annotation {row.get('id') if isinstance(row, dict) else row!r}"
