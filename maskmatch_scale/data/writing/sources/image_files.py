"""Samples that lie in files of their own: an image, and for some a label map. What all such data sets share.

A module of a data set lists its files and says which stream each belongs to (:class:`Pair`), and makes an
:class:`ImageFiles` of them, which is a `Source` for :func:`maskmatch_scale.data.writing.write.write_shards`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.writing.sources.duplicates import find_duplicates
from maskmatch_scale.data.writing.sources.images import EXTENSIONS, store_image
from maskmatch_scale.data.writing.sources.labels import (
    IGNORE,
    Classes,
    LabelRule,
    encode_label,
    load_classes,
    load_id_map,
)
from maskmatch_scale.data.writing.sources.splits import Pair, hold_out, listing_digest, rank
from maskmatch_scale.data.writing.write import EncodedSample, Stream, replace_file

REVISION = 1
"""Raise it with every change here or in a data set's module that changes what is written."""

DUPLICATES_NAME = "duplicates.jsonl"
"""One line an image that was dropped: `stream`, `image`, and `same_as` with those of the image that was kept."""

_HELD_OUT_FIRST = ("val", None, "dev", "labelled", "unlabelled")
"""Which of two equal images is kept, by stream; None stands for every other stream."""


@dataclass(frozen=True)
class Options:
    """What all data sets of files take.

    Attributes:
        classes: names instead of the data set's own: a file, or a table that comes along (:func:`load_classes`).
        id_map: label values instead of the data set's own: a file (:func:`load_id_map`).
        unknown_as_ignore: ignore label values that neither names.
        split_labelled, split_unlabelled, split_val: files in UniMatch's format.
        dev, val: labelled samples to hold out: a count or a share.
        split_seed: of the samples that are held out.
        max_side: longest side of an image, px; larger ones are shrunk.
        shuffle_seed: of the order of samples; negative keeps that of the data set.
        keep_duplicates: write images of equal bytes as often as they are there.
    """

    classes: str | None = None
    id_map: Path | None = None
    unknown_as_ignore: bool = False
    split_labelled: Path | None = None
    split_unlabelled: Path | None = None
    split_val: Path | None = None
    dev: str | None = None
    val: str | None = None
    split_seed: int = 0
    max_side: int | None = None
    shuffle_seed: int = 0
    keep_duplicates: bool = False


class FileItem(NamedTuple):
    """One sample: its key, and its files as in :class:`Pair`."""

    key: str
    image: str
    label: str | None


@dataclass(frozen=True)
class ReadFiles:
    """From an item to its sample; picklable.

    Args:
        root: what paths are relative to.
        rules: ends of label maps' names, and what to do with their values; the first that fits.
        max_side: as in :class:`Options`.
    """

    root: str
    rules: tuple[tuple[str, LabelRule], ...]
    max_side: int | None

    def __call__(self, item: FileItem) -> EncodedSample:
        """Read, check and encode.

        Raises:
            BadSample: a file is missing, empty, unreadable or too large, or the label map does not fit the image.
        """
        path = str(Path(self.root, item.image))
        stored = store_image(_read(path, "no_image"), path, labelled=item.label is not None, max_side=self.max_side)
        if item.label is None:
            return EncodedSample(item.key, stored.data, stored.extension)
        path = str(Path(self.root, item.label))
        data = _read(path, "no_label")
        rule = next(rule for end, rule in self.rules if item.label.endswith(end))
        values = rule.read(data, path)
        size = (values.shape[1], values.shape[0])
        if size != stored.original:
            (width, height), (own_width, own_height) = stored.original, size
            what = f"{own_width} × {own_height} px, but its image {item.image} has {width} × {height}"
            raise BadSample("label_size", f"{path}: {what}")
        if stored.size != stored.original:
            values = np.asarray(Image.fromarray(values).resize(stored.size, Image.Resampling.NEAREST))
        elif rule.keeps(data):
            return EncodedSample(item.key, stored.data, stored.extension, data)
        return EncodedSample(item.key, stored.data, stored.extension, encode_label(values))


@dataclass(frozen=True)
class ImageFiles:
    """A data set of image files, listed. A `Source`.

    Args:
        name: of the source.
        root: what the paths are relative to.
        listing: the samples of each stream, in the data set's order. Streams of none are left out.
        options: as the user gave them.
        known_classes: the data set's own; None if only `options.classes` can say.
        ready: ends of the names of label maps that hold class values already, and pass no id map.
        key_root: folders to leave out of keys: a regular expression for the start of a path.
        notes: what the user should know of the listing, a line each.
    """

    name: str
    root: Path
    listing: Mapping[str, Sequence[Pair]]
    options: Options
    known_classes: Classes | None = None
    ready: tuple[str, ...] = ()
    key_root: str = ""
    notes: tuple[str, ...] = ()
    ignore_index: int = field(default=IGNORE, init=False)

    def __post_init__(self) -> None:
        """Raise what the user got wrong before anything is written."""
        if not any(self.listing.values()):
            raise DataError(f"{self.root}: no images in it that source {self.name} would take")
        if self._labelled and not self.classes:
            raise DataError("label maps need names: --classes FILE, with a name a line in the order of their values")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label value."""
        return self._classes.names

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One colour a class."""
        return self._classes.palette

    @cached_property
    def settings(self) -> Mapping[str, object]:
        """What the shards depend on; which files there are, but not where they lie."""
        options = self.options
        rules = [[end, rule.as_json()] for end, rule in self._rules]
        return {
            "files": listing_digest(self.listing.items()),
            "class_names": _short_digest([self.classes, self.palette]),
            "label_values": _short_digest(rules),
            "unknown_as_ignore": options.unknown_as_ignore,
            "dev": options.dev,
            "val": options.val,
            "split_seed": options.split_seed,
            "max_side": options.max_side,
            "shuffle_seed": options.shuffle_seed,
            "keep_duplicates": options.keep_duplicates,
            "revision": REVISION,
            "pillow": version("pillow"),
        }

    @cached_property
    def streams(self) -> Mapping[str, Stream]:
        """Every sample, in the data set's order."""
        return {
            name: Stream(self._is_labelled(pairs), _items(pairs, self.key_root))
            for name, pairs in self.listing.items()
            if pairs
        }

    @property
    def render(self) -> ReadFiles:
        """What makes a sample of an item."""
        return ReadFiles(str(self.root), self._rules, self.options.max_side)

    def prepare(self, out: Path, *, resumed: bool, workers: int, progress: bool) -> Mapping[str, Stream]:
        """Drop images of equal bytes, then shuffle. What was dropped is kept in `out/duplicates.jsonl`."""
        streams = self.streams
        if self.options.keep_duplicates:
            (out / DUPLICATES_NAME).unlink(missing_ok=True)
        else:
            if not (resumed and (out / DUPLICATES_NAME).is_file()):
                lines = [json.dumps(line) + "\n" for line in self._duplicates(workers, progress)]
                replace_file(out / DUPLICATES_NAME, "".join(lines).encode())
            dropped: set[tuple[str, str]] = set()
            with (out / DUPLICATES_NAME).open(encoding="utf-8") as file:
                for line in map(json.loads, file):
                    dropped.add((line["stream"], line["image"]))
            if dropped:
                kept = {
                    name: [item for item in stream.items if (name, item.image) not in dropped]
                    for name, stream in streams.items()
                }
                streams = {name: Stream(streams[name].labelled, items) for name, items in kept.items() if items}
        seed = self.options.shuffle_seed
        if seed < 0:
            return streams
        return {
            name: Stream(stream.labelled, sorted(stream.items, key=lambda item: rank(seed, "order", item.image)))
            for name, stream in streams.items()
        }

    def _duplicates(self, workers: int, progress: bool) -> Iterator[Mapping[str, object]]:
        names = sorted(self.streams, key=_place_of)
        found = [(name, item.image) for name in names for item in self.streams[name].items]
        paths = [str(self.root / image) for _, image in found]
        for number, first in sorted(find_duplicates(paths, threads=workers, progress=progress).items()):
            (stream, image), (kept_stream, kept) = found[number], found[first]
            yield {"stream": stream, "image": image, "same_as": {"stream": kept_stream, "image": kept}}

    @cached_property
    def _labelled(self) -> bool:
        return any(self._is_labelled(pairs) for pairs in self.listing.values())

    @staticmethod
    def _is_labelled(pairs: Sequence[Pair]) -> bool:
        return bool(pairs) and pairs[0].label is not None

    @cached_property
    def _classes(self) -> Classes:
        if self.options.classes is not None:
            return load_classes(self.options.classes)
        return self.known_classes or Classes((), ())

    @cached_property
    def _rules(self) -> tuple[tuple[str, LabelRule], ...]:
        """Rules by the end of a label map's name; the last one is for all others."""
        classes, options = self._classes, self.options
        if options.id_map is not None:
            values: Mapping[int, int] | None = load_id_map(options.id_map, classes)
        else:
            table = classes if options.classes is not None else self.known_classes
            values = table.id_map if table is not None and table.values is not None else None
            if values is not None and all(value == number for value, number in values.items()):
                values = None  # label maps can stay as they are
        plain = LabelRule(len(classes.names), None, None, options.unknown_as_ignore)
        mapped = LabelRule(len(classes.names), values, classes.colours, options.unknown_as_ignore)
        ready = () if options.id_map is not None else self.ready  # the user's map is of the files' own values
        return (*((end, plain) for end in ready), ("", mapped))


def hold_out_dev(listing: dict[str, list[Pair]], options: Options) -> dict[str, list[Pair]]:
    """The listing with `dev` samples taken out of `labelled`, if they are asked for."""
    rest, held = hold_out(listing["labelled"], options.dev, options.split_seed, "--dev")
    return listing | {"labelled": rest, "dev": held}


def folder(path: Path, what: str) -> Path:
    """The path, if it is a folder; otherwise a DataError that says what should be there."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; {what}")
    return path


def images_below(root: Path, start: str = "", leave_out: Iterable[str] = ()) -> list[str]:
    """Images below a folder, relative to `root`, sorted; hidden files and folders are passed over.

    Args:
        root: what the paths are relative to.
        start: the folder, relative to `root`.
        leave_out: folders that are not entered, relative to `root`.
    """
    return [path for path in files_below(root, start, leave_out) if path[path.rfind(".") :].lower() in EXTENSIONS]


def files_below(root: Path, start: str = "", leave_out: Iterable[str] = ()) -> list[str]:
    """All files below a folder, likewise. Links are followed, but no folder is entered within itself."""
    found: list[str] = []
    closed = {str((root / path).resolve()) for path in leave_out}
    # Folders still to enter, each with the real paths it lies in.
    waiting: list[tuple[str, frozenset[str]]] = [(start, frozenset())]
    while waiting:
        relative, within = waiting.pop()
        real = str((root / relative).resolve())
        if real in closed or real in within:
            continue
        try:
            with os.scandir(root / relative) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = f"{relative}/{entry.name}" if relative else entry.name
                    if entry.is_dir():
                        waiting.append((path, within | {real}))
                    else:
                        found.append(path)
        except OSError as error:
            raise DataError(f"{root / relative}: cannot be listed ({error.strerror})") from None
    return sorted(found)


def keys_of(images: Sequence[str], key_root: str = "") -> list[str]:
    """A key for each path: without folders that `key_root` matches and without ending, `.` and `/` replaced by `_`.

    Where several paths come to the same key, each of them gets a hash of its path added, so that no key depends on the
    order of the paths.
    """
    start = re.compile(key_root) if key_root else None
    keys = [_key(path, start) for path in images]
    # By hashes first, for a set of ten million keys is large.
    hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
    _, place, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(counts[place] > 1).tolist()
    times = Counter(keys[number] for number in suspects)
    for number in [number for number in suspects if times[keys[number]] > 1]:
        path = images[number].encode("utf-8", "surrogateescape")
        keys[number] += "-" + hashlib.sha256(path).hexdigest()[:16]
    return keys


def _key(path: str, start: re.Pattern[str] | None) -> str:
    if start is not None and (match := start.match(path)):
        path = path[match.end() :]
    name = path[path.rfind("/") + 1 :]
    if "." in name:
        path = path[: path.rfind(".")]
    key = path.strip("/").replace("/", "_").replace(".", "_")
    # Names that readers of shards would pass over (`__meta__`), and bytes that are no text.
    key = key.encode("utf-8", "replace").decode()
    return f"x{key}" if key.startswith("__") or not key else key


def _items(pairs: Sequence[Pair], key_root: str) -> list[FileItem]:
    keys = keys_of([pair.image for pair in pairs], key_root)
    return [FileItem(key, pair.image, pair.label) for key, pair in zip(keys, pairs, strict=True)]


def _place_of(stream: str) -> int:
    return _HELD_OUT_FIRST.index(stream if stream in _HELD_OUT_FIRST else None)


def _short_digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _read(path: str, if_missing: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(if_missing, f"{path}: cannot be read ({error.strerror})") from None
