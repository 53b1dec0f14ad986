"""Label maps from annotations: outlines, run lengths, panoptic segments. How those of a sample are kept, and drawn.

A source whose labels are annotations packs those of an image into a line of JSON (:func:`pack`, :func:`pack_panoptic`),
which takes the place of a label map's path in :class:`Pair`. A process of the writer draws it
(:class:`AnnotationRule`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.opening import open_any
from maskmatch_scale.data.writing.sources.classes import IGNORE
from maskmatch_scale.extras import needs

FARTHEST_PX = 200_000
"""Coordinates that are larger than this are refused: pycocotools holds every pixel of an outline in memory."""
_SMALLEST_OUTLINE = 6
"""Numbers in an outline of three points."""


class Region(NamedTuple):
    """One annotated object.

    Attributes:
        value: class value, or `IGNORE`.
        shape: outlines, `[[x, y, x, y, …], …]` in px, whose union it is; or COCO's run lengths, `{"size": [h, w],
            "counts": …}`, a list of numbers or a compressed string.
        name: of the annotation, for messages.
        below: whether it is drawn below all others, however small it is.
    """

    value: int
    shape: Any
    name: str
    below: bool = False


def need_pycocotools(wanted_for: str) -> Any:
    """The module pycocotools.mask; :class:`UserError` if it is not installed, which names `wanted_for`."""
    return needs("pycocotools", "pycocotools.mask", "coco", wanted_for)


def pack(size: tuple[int, int], rest: int, regions: Iterable[Region]) -> str:
    """The annotations of an image on a line.

    Args:
        size: height and width that they are for, px.
        rest: class value, or `IGNORE`, of the pixels that no region covers.
        regions: in the order of their file.
    """
    return json.dumps({"size": size, "rest": rest, "regions": list(regions)}, separators=(",", ":"))


def pack_panoptic(png: str, segments: Mapping[int, int]) -> str:
    """The annotations of a panoptic image on a line.

    Args:
        png: its file, relative to :attr:`AnnotationRule.root`.
        segments: class value, or `IGNORE`, by id of a segment.
    """
    return json.dumps({"png": png, "segments": sorted(segments.items())}, separators=(",", ":"))


def outline_fault(points: Any) -> str | None:
    """What is wrong with one outline, `[x, y, x, y, …]`, or None; fewer than three points are not called wrong."""
    if not isinstance(points, list) or len(points) % 2:
        return "an outline is a list of pairs of numbers, [x, y, x, y, …], and segmentation a list of outlines"
    for number in points:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= FARTHEST_PX:
            return f"{number!r} is no coordinate in px"
    return None


def has_area(points: Sequence[float]) -> bool:
    """Whether an outline has three points."""
    return len(points) >= _SMALLEST_OUTLINE


@dataclass(frozen=True)
class AnnotationRule:
    """Draws the label map of an image from its annotations; picklable. It stands where a :class:`LabelRule` does.

    Where regions overlap, the one of fewer pixels is on top; of equal ones, the later in the file.

    Args:
        root: what paths of panoptic PNGs are relative to.
    """

    root: str = ""

    def read(self, data: bytes, name: str) -> NDArray[np.uint8]:
        """Draw a label map.

        Args:
            data: what `pack` or `pack_panoptic` returned, encoded.
            name: of what the annotations are of, for the message.

        Returns:
            uint8 (H, W), class values and `IGNORE`.

        Raises:
            BadSample: `no_label`, `not_a_label` or `label_value`: run lengths or a PNG that cannot be read, or that do
                not agree with the rest.
        """
        packed = json.loads(data)
        if "png" in packed:
            return self._panoptic(packed["png"], dict(packed["segments"]))
        height, width = packed["size"]
        regions = [Region(*region) for region in packed["regions"]]
        drawn = [_drawn(region, height, width, name) for region in regions]
        pixels = [np.count_nonzero(mask) for _, mask in drawn]
        values = np.full((height, width), packed["rest"], np.uint8)
        # The sort is stable: of equal areas the later one is drawn later.
        for number in sorted(range(len(regions)), key=lambda n: (not regions[n].below, -pixels[n])):
            columns, mask = drawn[number]
            values[:, columns][mask] = regions[number].value
        return values

    def keeps(self, data: bytes) -> bool:
        """Never: annotations are not stored."""
        return False

    def as_json(self) -> object:
        """What the drawn label maps depend on, for the settings."""
        return ["annotations", version("pycocotools")]

    def _panoptic(self, png: str, segments: Mapping[int, int]) -> NDArray[np.uint8]:
        path = Path(self.root, png)
        try:
            with open_any(path) as image:
                if image.mode not in ("RGB", "RGBA") or image.format != "PNG":
                    what = f"a panoptic label map is an RGB PNG, this is {image.format} of mode {image.mode}"
                    raise BadSample("not_a_label", f"{path}: {what}")
                colours = np.asarray(image.convert("RGB"), np.uint32)
        except FileNotFoundError:
            raise BadSample("no_label", f"{path}: no such file; --segments DIR is the folder of the PNGs") from None
        except BadSample:
            raise
        except Exception as error:  # Pillow's decoders raise nearly any exception for damaged files
            raise BadSample("not_a_label", f"{path}: not a readable label map ({error})") from None
        ids = colours @ np.array([1, 1 << 8, 1 << 16], np.uint32)
        found, place = np.unique(ids, return_inverse=True)
        known = {0: IGNORE, **segments}
        if unknown := [number for number in found.tolist() if number not in known]:
            raise BadSample("label_value", f"{path}: segment {unknown[0]} is not in segments_info of the JSON")
        table = np.array([known[number] for number in found.tolist()], np.uint8)
        return table[place].reshape(ids.shape)


def run_lengths(counts: Any) -> NDArray[np.int64]:
    """The lengths of COCO's runs, column by column, first of pixels outside.

    pycocotools is not used for it: it returns memory that nobody has written for run lengths that end too early.

    Args:
        counts: a list of them, or the compressed string: groups of 5 bits, low ones first, each number but the first
            three as the difference to the one before the last.

    Raises:
        ValueError: neither.
    """
    if isinstance(counts, list):
        return np.array(counts, np.int64) if counts else np.zeros(0, np.int64)
    if not isinstance(counts, str) or not counts.isascii():
        raise ValueError("neither numbers nor a string")
    characters = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if len(characters) == 0 or characters.min() < 0 or characters.max() > 63 or characters[-1] & 32:
        raise ValueError("not a compressed string")
    last = np.flatnonzero(characters & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    groups = last - first + 1
    if groups.max() > 12:
        raise ValueError("a number of more than 60 bits")
    place = np.arange(len(characters)) - np.repeat(first, groups)
    numbers = np.add.reduceat((characters & 31) << 5 * place, first)
    numbers -= np.where(characters[last] & 16, np.int64(1) << 5 * groups, 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _drawn(region: Region, height: int, width: int, name: str) -> tuple[slice, NDArray[np.bool_]]:
    """The columns of an image that a region touches, and which of their pixels it covers: bool (H, columns)."""
    runs = region.shape
    if isinstance(runs, list):
        coco = need_pycocotools("annotations")
        merged = coco.merge(coco.frPyObjects(runs, height, width)) if runs else {"counts": b""}
        runs = {"size": [height, width], "counts": merged["counts"].decode() or [height * width]}
    try:
        lengths = run_lengths(runs.get("counts"))
        whole = lengths.min(initial=0) >= 0 and int(lengths.sum()) == height * width
    except (ValueError, OverflowError, TypeError) as error:
        raise BadSample("not_a_label", f"{name}: {region.name}: its run lengths cannot be read ({error})") from None
    if not whole or runs.get("size") != [height, width]:
        what = f"its run lengths are of {runs.get('size')}, or of another sum; [{height}, {width}] is needed"
        raise BadSample("label_size", f"{name}: {region.name}: {what}")
    edges = np.cumsum(lengths)
    covered = lengths[1::2] > 0
    if not covered.any():
        return slice(0, 0), np.zeros((height, 0), np.bool_)
    first = int(edges[0:-1:2][covered][0]) // height
    last = -(-int(edges[1::2][covered][-1]) // height)
    edges = np.clip(edges - first * height, 0, (last - first) * height)
    inside = np.arange(len(edges)) % 2 == 1
    return slice(first, last), np.repeat(inside, np.diff(edges, prepend=0)).reshape(last - first, height).T
