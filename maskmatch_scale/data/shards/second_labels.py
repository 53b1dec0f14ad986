"""A stream of images whose label maps are in the shards of another folder, matched by the keys of the samples.

The keys of both folders are read once, from the headers of all their shards, and what belongs together is kept as
numbers (:mod:`~maskmatch_scale.data.shards.kept`).

Decision: docs/decisions/0068-parts-of-sources.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote.shard_cache import Fetched
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.kept import Numbers, Unfinished, kept_numbers
from maskmatch_scale.data.shards.reading import RawSample, ShardStream
from maskmatch_scale.data.shards.selection import digest_of, over_shards
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.redact import shown

Prepared = TypeVar("Prepared")

MOST_LABELS = 2_000_000
"""A folder with more label maps is refused: their keys are in memory while they are matched, some 200 bytes each."""


class LabelsElsewhere(ShardStream):
    """Images of one folder with the label maps of another one.

    Args:
        root: path or address of the folder of the images.
        name: of their stream.
        data: how remote shards are fetched.
        labels_root: path or address of the folder of the label maps, which are in its stream ``labelled``.
        source: name of the source, for messages.
        cache: folder where it is kept which of them belong together.
        others_wait_s: for so long other machines wait for this one, in seconds.
        index: of the folder of the images, if it was read already.
        strict: see :class:`ShardStream`.

    Attributes:
        numbers: int64 (n,), ascending: the images that have a label map, by their numbers in the stream.
        unmatched: what has no counterpart, in words that begin with a comma; or empty.

    Raises:
        DataError: see :class:`ShardStream`; no image has a label map; a key is there twice; or there are too many.
    """

    def __init__(
        self,
        root: str,
        name: str,
        data: DataRecipe,
        labels_root: str,
        *,
        source: str,
        cache: Path,
        others_wait_s: float,
        index: ShardIndex | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__(root, name, data, index=index, labels=False, strict=strict)
        self.label_stream = ShardStream(labels_root, "labelled", data, labels=True, images=False, strict=strict)
        where = shown(labels_root)
        if len(self.label_stream) > MOST_LABELS:
            raise DataError(
                f"{where}: {len(self.label_stream)} label maps, and at most {MOST_LABELS} are matched by keys; name an "
                "index of fewer shards"
            )
        digest = digest_of(self, "labels", digest_of(self.label_stream))
        what = f"source {source!r}: matching keys with {where}"
        self._kept = cache / f"labels-{digest}.npy"
        found, facts = kept_numbers(cache, self._kept.stem, partial(self._match, source, others_wait_s), what)
        if facts["fault"] is not None:
            raise DataError(f"source {source!r}: {facts['fault']}")
        self.numbers, self._label_numbers = found[:, 0], found[:, 1]
        without = {f"images without a label map in {where}": len(self) - len(found)}
        without["label maps without an image"] = len(self.label_stream) - len(found)
        self.unmatched = "".join(f", {count} {words}" for words, count in without.items() if count)

    def _match(self, source: str, others_wait_s: float, _: Unfinished) -> tuple[Numbers, dict[str, Any]]:
        """int64 (n, 2): numbers of the image and of its label map."""
        labels: dict[str, int] = {}
        pairs: dict[str, tuple[int, int]] = {}
        twice: list[str] = []
        last = ""

        def note_label(key: str, number: int) -> None:
            if key in labels:
                twice.append(f"{shown(self.label_stream.root)}: key {key!r} is there twice")
            labels[key] = number

        def note_image(key: str, number: int) -> None:
            nonlocal last
            last = key
            if key in labels:
                if key in pairs:
                    twice.append(f"{shown(self.root)}: key {key!r} is there twice")
                pairs[key] = number, labels[key]

        for stream, note in ((self.label_stream, note_label), (self, note_image)):
            _over_keys(stream, note, f"source {source!r}: keys of {shown(stream.root)}", others_wait_s)
        fault = None
        if twice:
            fault = f"{twice[0]}, so labels cannot be matched by keys; rename one"
        elif not pairs:
            example = f" ({last!r} here, {next(iter(labels))!r} there)" if last and labels else ""
            fault = (
                f"labels={shown(self.label_stream.root)}: no sample of {shown(self.root)} has the key of a label "
                f"map{example}; name the folder with the labels of these images"
            )
        return np.array(sorted(pairs.values()), dtype=np.int64).reshape(-1, 2), {"fault": fault}

    def load(
        self, shard: int, place: int, prepare: Callable[[RawSample], Prepared], *, patience_s: float = math.inf
    ) -> Prepared:
        """See :meth:`ShardStream.load`; the sample must be one of :attr:`numbers`.

        Raises:
            DataError: also if a shard has changed since keys were matched, so that the label map is of another image.
        """
        number = int(self.shards.starts[shard]) + place
        at = int(np.searchsorted(self.numbers, number))
        assert self.numbers[at] == number
        label = self.label_stream.locate(int(self._label_numbers[at]))

        def with_label(image: RawSample) -> Prepared:
            def prepare_both(raw: RawSample) -> Prepared:
                both = f"{shown(image.shard)}, label map in {shown(raw.shard)}"  # for messages
                if raw.key != image.key:
                    raise DataError(
                        f"{both}: where the label map of {image.key!r} was is that of {raw.key!r}: a shard has changed "
                        f"since keys were matched; remove {self._kept}, and start again"
                    )
                return prepare(replace(image, shard=both, label=raw.label, remap=raw.remap))

            return self.label_stream.load(*label, prepare_both, patience_s=patience_s)

        return super().load(shard, place, with_label, patience_s=patience_s)

    def identities(self) -> NDArray[np.uint8]:
        """Of the images and of the label maps."""
        return np.concatenate([super().identities(), self.label_stream.identities()])

    @property
    def arrivals(self) -> int:
        """Of both folders."""
        return super().arrivals + self.label_stream.arrivals

    def take_figures(self) -> Fetched:
        """Of both folders."""
        return super().take_figures() + self.label_stream.take_figures()


def _over_keys(stream: ShardStream, note: Callable[[str, int], None], task: str, others_wait_s: float) -> None:
    """Call ``note`` with the key and number of each sample of a stream."""

    def look(shard: int, file: FileIO) -> tuple[int, list[str]]:
        table = stream.read_table(shard, file)
        places = islice(range(len(table)), int(stream.shards.samples[shard]))
        return int(stream.shards.starts[shard]), [table.key(place) for place in places]

    for found in over_shards(stream, look, task, others_wait_s):
        if not isinstance(found, BadSample):  # else its samples are not used, and counted as such
            start, keys = found
            for number, key in enumerate(keys, start=start):
                note(key, number)
