"""A list of images: CSV with a header line, or JSON lines.

::

    image,label,stream
    scans/a.jpg,masks/a.png,labelled
    scans/b.jpg,,unlabelled

`label` and `stream` may be missing. Without a stream, samples with a label are `labelled`, the others `unlabelled`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.sources.image_files import ImageFiles
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.data.writing.sources.splits import Pair, hold_out

_STREAM = re.compile("[a-z0-9_]+")


def image_list(
    file: Path,
    options: Options,
    *,
    root: Path | None = None,
    image_column: str = "image",
    label_column: str = "label",
    stream_column: str = "stream",
) -> ImageFiles:
    """List the samples that a list names.

    Args:
        file: `.csv`, or `.jsonl` with an object a line.
        options: no split files; a list has its own column for that.
        root: what paths are relative to; None: the folder of the list.
        image_column: name of the column with the image.
        label_column: likewise for the label map.
        stream_column: likewise for the stream; `train` there is another word for `labelled`, or `unlabelled` if there
            is no label.

    Raises:
        DataError: no such file, no such column, or a row that cannot be used; names the line.
    """
    if options.split_labelled or options.split_unlabelled or options.split_val:
        raise DataError(f"--split-…: a list says itself which stream a sample is of, in its column {stream_column!r}")
    listing: dict[str, list[Pair]] = {"labelled": [], "unlabelled": []}
    seen: set[tuple[str, str]] = set()
    for number, row in _rows(file):
        where = f"{file}:{number}"
        image, label, stream = (row.get(column) or "" for column in (image_column, label_column, stream_column))
        if not image:
            there = ", ".join(map(str, row))
            raise DataError(f"{where}: no image; --image-column names the column, there are: {there}")
        if stream in ("", "train"):
            stream = "labelled" if label else "unlabelled"
        if not _STREAM.fullmatch(stream):
            raise DataError(f"{where}: {stream!r} is no name of a stream; use labelled, unlabelled, dev or val")
        pair = Pair(image, label if label and stream != "unlabelled" else None)
        if pair.label is None and stream in ("labelled", "dev", "val"):
            raise DataError(f"{where}: {image} is {stream}, but has no label map in column {label_column!r}")
        if (stream, image) in seen:
            raise DataError(f"{where}: {image} is in stream {stream} twice")
        seen.add((stream, image))
        others = listing.setdefault(stream, [])
        if others and (others[0].label is None) != (pair.label is None):
            raise DataError(f"{where}: stream {stream!r} has samples with and without label maps; use two streams")
        others.append(pair)
    if options.classes is not None and not any(pair.label for pairs in listing.values() for pair in pairs):
        columns = ", ".join(dict.fromkeys(str(column) for _, row in _rows(file) for column in row))
        raise DataError(
            f"{file}: no row has a label map in column {label_column!r}; --label-column names it of: {columns}; "
            "for images alone leave out --classes"
        )
    for name, amount in (("val", options.val), ("dev", options.dev)):
        if amount is not None:
            if name in listing:
                raise DataError(f"--{name} {amount}: {file} says already which samples are {name}; leave it out")
            listing["labelled"], listing[name] = hold_out(listing["labelled"], amount, options.split_seed, f"--{name}")
    return ImageFiles("list", file.parent if root is None else root, listing, options)


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if file.suffix not in (".csv", ".jsonl"):
        what = "a folder; for one, use `maskmatch shards write folder`" if file.is_dir() else "a list is .csv or .jsonl"
        raise DataError(f"{file}: {what}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                reader = csv.DictReader(lines)
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict) or not all(v is None or isinstance(v, str) for v in row.values()):
                        row = {k: v for k, v in row.items() if isinstance(v, str)} if isinstance(row, dict) else {}
                    yield number, row
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise DataError(f"{file}: not a list ({error})") from None
