"""Samples that lie in files of their own: an image, and for some a label map. What all such data sets share.

The module of a data set lists its files, says which stream each belongs to (:class:`Pair`), and makes an
:class:`ImageFiles` of them. That is the data source which :func:`maskmatch_scale.data.writing.write_shards` writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.protocol import StreamItems
from maskmatch_scale.data.writing.sources.classes import IGNORE, Classes, load_classes, load_id_map
from maskmatch_scale.data.writing.sources.duplicates import find_duplicates
from maskmatch_scale.data.writing.sources.keys import keys_of
from maskmatch_scale.data.writing.sources.label_rule import LabelRule
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.data.writing.sources.read_files import FileItem, ReadFiles
from maskmatch_scale.data.writing.sources.splits import Pair, listing_digest, sort_key
from maskmatch_scale.files import write_whole

REVISION = 1
"""Raise it with every change, here or in the module of a data set, that changes what is written."""

DUPLICATES_NAME = "duplicates.jsonl"
"""One line an image that was dropped: `stream`, `image`, and `same_as` with those of the image that was kept."""

_HELD_OUT_FIRST = ("val", None, "dev", "labelled", "unlabelled")
"""Which of two equal images is kept, by stream; None stands for every other stream."""


@dataclass(frozen=True)
class ImageFiles:
    """A data set of image files, listed: a :class:`maskmatch_scale.data.writing.DataSource`.

    Args:
        name: of the source.
        root: what the paths are relative to.
        listing: the samples of each stream, in the data set's order. Streams of none are left out.
        options: as the user gave them.
        known_classes: the data set's own; None if only `options.classes` can say.
        ready: ends of the names of label maps that hold class values already; the id map is not applied to them.
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
            **({"apply_exif": True} if options.apply_exif else {}),
        }

    @cached_property
    def streams(self) -> Mapping[str, StreamItems]:
        """Every sample, in the data set's order."""
        return {
            name: StreamItems(self._is_labelled(pairs), _items(pairs, self.key_root))
            for name, pairs in self.listing.items()
            if pairs
        }

    @property
    def render(self) -> ReadFiles:
        """What makes a sample of an item."""
        return ReadFiles(str(self.root), self._rules, self.options.max_side, self.options.apply_exif)

    def prepare(self, out: Path, *, resumed: bool, workers: int, progress: bool) -> Mapping[str, StreamItems]:
        """Drop images of equal bytes, then shuffle. What was dropped is kept in `out/duplicates.jsonl`."""
        streams = self.streams
        if self.options.keep_duplicates:
            (out / DUPLICATES_NAME).unlink(missing_ok=True)
        else:
            if not (resumed and (out / DUPLICATES_NAME).is_file()):
                lines = [json.dumps(line) + "\n" for line in self._duplicates(workers, progress)]
                write_whole(out / DUPLICATES_NAME, "".join(lines))
            dropped: set[tuple[str, str]] = set()
            with (out / DUPLICATES_NAME).open(encoding="utf-8") as file:
                for line in map(json.loads, file):
                    dropped.add((line["stream"], line["image"]))
            if dropped:
                kept = {
                    name: [item for item in stream.items if (name, item.image) not in dropped]
                    for name, stream in streams.items()
                }
                streams = {name: StreamItems(streams[name].labelled, items) for name, items in kept.items() if items}
        seed = self.options.shuffle_seed
        if seed < 0:
            return streams
        return {
            name: StreamItems(
                stream.labelled, sorted(stream.items, key=lambda item: sort_key(seed, "order", item.image))
            )
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


def _items(pairs: Sequence[Pair], key_root: str) -> list[FileItem]:
    keys = keys_of([pair.image for pair in pairs], key_root)
    return [FileItem(key, pair.image, pair.label) for key, pair in zip(keys, pairs, strict=True)]


def _place_of(stream: str) -> int:
    return _HELD_OUT_FIRST.index(stream if stream in _HELD_OUT_FIRST else None)


def _short_digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
