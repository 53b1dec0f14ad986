"""Samples that lie in files of their own: an image, and for some a label map. What all such data sets share.

The module of a data set lists its files, says which stream each belongs to (:class:`Pair`), and makes an
:class:`ImageFiles` of them. That is the data source which :func:`maskmatch_scale.data.writing.write_shards` writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.bands import Band
from maskmatch_scale.data.shards.index import INDEX_NAME
from maskmatch_scale.data.writing.journal import DUPLICATES_NAME, read_duplicates, write_duplicates
from maskmatch_scale.data.writing.protocol import Added, StreamItems
from maskmatch_scale.data.writing.sources.annotations import AnnotationRule
from maskmatch_scale.data.writing.sources.appending import compare, is_kept, newer_files, other_images
from maskmatch_scale.data.writing.sources.band_ranges import FoundBands, find_bands
from maskmatch_scale.data.writing.sources.classes import IGNORE, Classes, load_classes, load_id_map
from maskmatch_scale.data.writing.sources.duplicates import find_duplicates
from maskmatch_scale.data.writing.sources.keys import keys_of
from maskmatch_scale.data.writing.sources.label_rule import LabelRule
from maskmatch_scale.data.writing.sources.label_values import binary_values
from maskmatch_scale.data.writing.sources.options import Options
from maskmatch_scale.data.writing.sources.read_files import FileItem, ReadFiles
from maskmatch_scale.data.writing.sources.read_tiles import ReadTiles
from maskmatch_scale.data.writing.sources.splits import Pair, listing_digest, sort_key
from maskmatch_scale.data.writing.sources.tiles import Tiling, cut_streams, is_named_tiff, tiling_of

REVISION = 2
"""Raise it with every change, here or in the module of a data set, that changes what is written."""

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
        annotations: what draws label maps; then `Pair.label` is not the path of one, but the annotations themselves.
    """

    name: str
    root: Path
    listing: Mapping[str, Sequence[Pair]]
    options: Options
    known_classes: Classes | None = None
    ready: tuple[str, ...] = ()
    key_root: str = ""
    notes: tuple[str, ...] = ()
    annotations: AnnotationRule | None = None
    ignore_index: int = field(default=IGNORE, init=False)

    def __post_init__(self) -> None:
        """Raise what the user got wrong before anything is written."""
        if not any(self.listing.values()):
            told = "; ".join(("", *self.notes))
            raise DataError(f"{self.root}: no images in it that source {self.name} would take{told}")
        _ = self._tiling
        if self.options.value_range is not None and self.options.bands is None:
            raise DataError(f"--value-range {self.options.value_range}: --bands must name the bands that it is for")
        if self.options.apply_exif:
            for option, given in (("--tile", self.options.tile), ("--bands", self.options.bands)):
                if given is not None:
                    raise DataError(f"--apply-exif and {option} exclude each other: turn the files first")
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
        rules: object = [[end, rule.as_json()] for end, rule in self._rules]
        if self.annotations is not None:
            rules = self.annotations.as_json()
        of_bands = {} if self._bands is None else self._bands.rule.as_json()
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
            **self._tile_settings,
            **of_bands,
        }

    @property
    def bands(self) -> tuple[Band, ...]:
        """Bands of the images; none if they are plain ones."""
        return () if self._bands is None else self._bands.rule.bands

    @property
    def found(self) -> tuple[str, ...]:
        """What the user should know of the images that were looked at, a line each."""
        return () if self._bands is None else self._bands.notes

    @cached_property
    def streams(self) -> Mapping[str, StreamItems]:
        """Every sample, in the data set's order."""
        return {
            name: StreamItems(self._is_labelled(pairs), _items(pairs, self.key_root))
            for name, pairs in self.listing.items()
            if pairs
        }

    @property
    def render(self) -> ReadFiles | ReadTiles:
        """What makes a sample of an item."""
        whole = ReadFiles(
            str(self.root),
            self._rules,
            self.options.max_side,
            bands=None if self._bands is None else self._bands.rule,
            annotations=self.annotations,
            apply_exif=self.options.apply_exif,
        )
        return whole if self._tiling is None else ReadTiles(whole)

    def prepare(self, out: Path, *, resumed: bool, workers: int, progress: bool) -> Mapping[str, StreamItems]:
        """Drop images of equal bytes, shuffle, and cut into tiles. `out/duplicates.jsonl` keeps what was dropped."""
        streams = self.streams
        if self.options.keep_duplicates:
            (out / DUPLICATES_NAME).unlink(missing_ok=True)
        else:
            if not (resumed and (out / DUPLICATES_NAME).is_file()):
                names = sorted(streams, key=_place_of)
                items = [(name, item) for name in names for item in streams[name].items]
                write_duplicates(out, self._duplicates(items, workers, progress))
            dropped = {(line["stream"], line["image"]) for line in read_duplicates(out)}
            if dropped:
                kept = {
                    name: [item for item in stream.items if (name, item.image) not in dropped]
                    for name, stream in streams.items()
                }
                streams = {name: StreamItems(streams[name].labelled, items) for name, items in kept.items() if items}
        streams = self._shuffled(streams)
        if self._tiling is None:
            return streams
        return cut_streams(streams, self.root, self._tiling, threads=workers, progress=progress)

    def added(self, out: Path, keys: Mapping[str, Mapping[str, int]], *, workers: int, progress: bool) -> Added:
        """The images that a folder does not have, but for those that have the same bytes as another one."""
        noted = read_duplicates(out)
        equal = [line for line in noted if is_kept(line["same_as"], keys, self.key_root)]
        compared = compare(self.streams, keys, {line["image"] for line in equal})
        new = compared.new
        if not self.options.keep_duplicates:
            fresh = [(name, item) for name in sorted(new, key=_place_of) for item in new[name]]
            found = self._duplicates([*compared.known, *fresh], workers, progress)
            of_fresh = {(name, item.image) for name, item in fresh}
            lines = [line for line in found if (line["stream"], line["image"]) in of_fresh]
            if [*equal, *lines] != noted:
                write_duplicates(out, [*equal, *lines])
            gone = {(line["stream"], line["image"]) for line in lines}
            new = {name: [item for item in new[name] if (name, item.image) not in gone] for name in new}
        streams = {name: StreamItems(self.streams[name].labelled, items) for name, items in new.items() if items}
        notes = compared.notes + newer_files(self.root, compared.unmoved, out / INDEX_NAME, workers)
        if not (self.options.max_side or self.options.apply_exif or self.options.bands):
            notes += other_images(self.root, compared, workers)
        return Added(self._shuffled(streams), notes)

    def _shuffled(self, streams: Mapping[str, StreamItems]) -> Mapping[str, StreamItems]:
        seed = self.options.shuffle_seed
        if seed < 0:
            return streams
        return {
            name: StreamItems(
                stream.labelled, sorted(stream.items, key=lambda item: sort_key(seed, "order", item.image))
            )
            for name, stream in streams.items()
        }

    def _duplicates(
        self, items: Sequence[tuple[str, FileItem]], workers: int, progress: bool
    ) -> Iterator[Mapping[str, object]]:
        """Of items with their streams, those with the bytes of an earlier one, as lines of `duplicates.jsonl`."""
        paths = [str(self.root / item.image) for _, item in items]
        for number, first in sorted(find_duplicates(paths, threads=workers, progress=progress).items()):
            (stream, item), (kept_stream, kept) = items[number], items[first]
            yield {
                "stream": stream,
                "image": item.image,
                "same_as": {"stream": kept_stream, "image": kept.image},
            }

    @cached_property
    def _tiling(self) -> Tiling | None:
        return tiling_of(self.options.tile, self.options.overlap, self.options.max_side)

    @property
    def _tile_settings(self) -> Mapping[str, object]:
        """Settings that only shards of tiles have: those of others stay as they were."""
        if self._tiling is None:
            return {}
        has_tiffs = any(is_named_tiff(pair.image) for pairs in self.listing.values() for pair in pairs)
        of_tiffs = {"rasterio": version("rasterio")} if has_tiffs and find_spec("rasterio") else {}
        return {"tile": self._tiling.tile_px, "overlap": self._tiling.overlap_px, **of_tiffs}

    @cached_property
    def _bands(self) -> FoundBands | None:
        options, images = self.options, (pair.image for pairs in self.listing.values() for pair in pairs)
        if options.bands is None:
            return None
        return find_bands(options.bands, options.value_range, self.root, images)

    @cached_property
    def _labelled(self) -> bool:
        return any(self._is_labelled(pairs) for pairs in self.listing.values())

    @staticmethod
    def _is_labelled(pairs: Sequence[Pair]) -> bool:
        return bool(pairs) and pairs[0].label is not None

    @cached_property
    def _classes(self) -> Classes:
        known, given = self.known_classes or Classes((), ()), self.options.classes
        if given is None:
            return known
        classes = load_classes(given)
        if self.options.id_map is not None or known.values is None or classes.values is not None or self._are_values:
            return classes
        if len(classes.names) != len(known.names):
            raise DataError(
                f"--classes {given}: {len(classes.names)} names for the {len(known.names)} classes of source "
                f"{self.name}; --id-map FILE says which label values of the data set belong to which of them"
            )
        return replace(classes, values=known.values, ignored=known.ignored)

    @property
    def _are_values(self) -> bool:
        """Whether the label values of the data set's own files are class values."""
        known = self.known_classes
        return known is not None and all(value == number for value, number in known.id_map.items())

    @cached_property
    def _rules(self) -> tuple[tuple[str, LabelRule], ...]:
        """Rules by the end of a label map's name; the last one is for all others."""
        classes, options = self._classes, self.options
        if options.id_map is not None:
            values: Mapping[int, int] | None = load_id_map(options.id_map, classes)
        elif classes.values is not None:
            values = classes.id_map
            if all(value == number for value, number in values.items()):
                values = None  # label maps can stay as they are
        else:
            values = self._binary_values
        plain = LabelRule(len(classes.names), None, None, options.unknown_as_ignore)
        is_found = options.id_map is None and self._binary_values is not None
        mapped = LabelRule(len(classes.names), values, classes.colours, options.unknown_as_ignore, is_found)
        ready = () if options.id_map is not None else self.ready  # the user's map is of the files' own values
        return (*((end, plain) for end in ready), ("", mapped))

    @cached_property
    def _binary_values(self) -> Mapping[int, int] | None:
        """Class values by label value of binary masks of 0 and 255; None: they are none, or their values are known."""
        said = self.options.id_map is not None or self._classes.values is not None or self.annotations is not None
        if said or not self._labelled:
            return None
        pairs = (pair for pairs in self.listing.values() for pair in pairs)
        labels = [pair.label for pair in pairs if pair.label is not None and not pair.label.endswith(self.ready)]
        unknown_as_ignore = self.options.unknown_as_ignore
        return binary_values(self.root, labels, self.classes, unknown_as_ignore=unknown_as_ignore)

    @property
    def value_notes(self) -> tuple[str, ...]:
        """What the user should know of the values of label maps, a line each; they are read for it.

        Raises:
            DataError: nothing says what they mean.
        """
        if self._binary_values is None:
            return ()
        named = ", ".join(f"{value} = {self.classes[number]}" for value, number in self._binary_values.items())
        return (f"label maps hold 0 and 255: written as {named}; --id-map says otherwise",)


def _items(pairs: Sequence[Pair], key_root: str) -> list[FileItem]:
    keys = keys_of([pair.image for pair in pairs], key_root)
    return [FileItem(key, pair.image, pair.label) for key, pair in zip(keys, pairs, strict=True)]


def _place_of(stream: str) -> int:
    return _HELD_OUT_FIRST.index(stream if stream in _HELD_OUT_FIRST else None)


def _short_digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
