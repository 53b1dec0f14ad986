"""Which samples of a source with an index are used: a range of its shards, a condition on metadata, labels from
elsewhere, and a part of what is left, in this order.

Decision: docs/decisions/0068-parts-of-sources.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order.epoch import permutation
from maskmatch_scale.data.shards.folder import fetch_options, load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.shards.second_labels import LabelsElsewhere
from maskmatch_scale.data.shards.selection import chosen_numbers
from maskmatch_scale.recipe import Recipe, SourceRecipe
from maskmatch_scale.recipe.values import shard_ranges
from maskmatch_scale.recipe.where import Where
from maskmatch_scale.redact import shown
from maskmatch_scale.seeds import derive_seed

_MANY_SHARDS = 64
"""From so many shards on, a part is made of whole shards."""


@dataclass(frozen=True)
class Chosen:
    """The samples of a source that are used.

    Attributes:
        stream: its shards, of which some may have been left out.
        numbers: int64, ascending: the samples of the stream that are used; None = all.
        note: how many these are, of how many, and why, for people; None if nothing was left out by the recipe.
    """

    stream: ShardStream
    numbers: NDArray[np.int64] | None
    note: str | None

    def __len__(self) -> int:
        """How many samples are used."""
        return len(self.stream) if self.numbers is None else len(self.numbers)


def choose(source: SourceRecipe, side: str, name: str, recipe: Recipe, index: ShardIndex, *, strict: bool) -> Chosen:
    """Open a source with an index, and choose its samples.

    Args:
        source: the source.
        side: ``labelled`` or ``unlabelled``; also the name of its stream if the source names none.
        name: of the source; its part is drawn from it.
        recipe: section data and ``engine.collective_timeout_s`` are read.
        index: of ``data.root``.
        strict: see :class:`ShardStream`.

    Raises:
        DataError: its stream is missing or empty; there are no such shards; a condition or labels leave nothing; or its
            labels do not mean what those of ``data.root`` mean.
    """
    data, root = recipe.data, source.root
    assert root is not None
    whole = index if root == data.root else load_index(root, data, key=f"data.{side}: root")
    stream_name = source.stream or side
    if source.labels is not None and source.stream is None and side not in whole.streams:
        stream_name = "unlabelled"
    seed = derive_seed(data.split_seed, "part", name)
    kept, is_parted = whole, source.part == 1
    if stream_name in whole.streams:  # else opening it says what there is
        kept, is_parted = _chosen_shards(source, whole, stream_name, name, seed)
    stream, left_out = _open(source, side, stream_name, name, recipe, kept, index, strict=strict)
    numbers = stream.numbers if isinstance(stream, LabelsElsewhere) else None
    if source.where is not None:
        cache, wait_s = fetch_options(data).cache, recipe.engine.collective_timeout_s
        found, without = chosen_numbers(stream, Where(source.where), name, cache, wait_s)
        left_out += without
        numbers = found if numbers is None else np.intersect1d(numbers, found, assume_unique=True)
        if not len(numbers):
            raise DataError(
                f"source {name!r}: none of the {len(found)} samples that `where` chooses has a label map in "
                f"{shown(source.labels or '')}; choose another filter, or leave it out"
            )
    if not is_parted:
        numbers = _part(source.part, stream, numbers, seed)
    if numbers is not None and len(numbers) == len(stream):
        numbers = None
    used, of = len(stream) if numbers is None else len(numbers), whole.streams[stream_name].samples
    note = f"{side} source {name!r}: {used} of {of} samples ({choice_of(source)}){left_out}"
    return Chosen(stream, numbers, note if choice_of(source) else None)


def choice_of(source: SourceRecipe) -> str:
    """By what the recipe chooses among the samples of a source, in words; empty if it uses all."""
    words = [f"shards {source.shards}"] if source.shards is not None and not source.is_sequential else []
    words += [f"where {Where(source.where).text}"] if source.where is not None else []
    words += [f"labels of {shown(source.labels)}"] if source.labels is not None else []
    words += [f"part {source.part:g}"] if source.part < 1 else []
    return ", ".join(words)


def _chosen_shards(
    source: SourceRecipe, whole: ShardIndex, stream: str, name: str, seed: int
) -> tuple[ShardIndex, bool]:
    """The index with the shards that a source names; and whether these are already the part that it wants."""
    kept = whole
    if source.shards is not None:
        kept = kept.with_shards(stream, _in_ranges(source.shards, len(kept.streams[stream].shards), name))
    sizes = kept.streams[stream].shards.samples
    if source.where is None and source.labels is None and source.part < 1 and len(sizes) >= _MANY_SHARDS:
        return kept.with_shards(stream, drawn_shards(source.part, sizes, seed).tolist()), True
    return kept, source.part == 1


def _open(
    source: SourceRecipe,
    side: str,
    stream_name: str,
    name: str,
    recipe: Recipe,
    own: ShardIndex,
    index: ShardIndex,
    *,
    strict: bool,
) -> tuple[ShardStream, str]:
    """The stream of shards of a source; and which of its images or labels have no counterpart, in words."""
    data, labelled, root = recipe.data, side == "labelled", source.root
    assert root is not None
    meaning, unmatched = own, ""
    if source.labels is not None:
        wait_s = recipe.engine.collective_timeout_s
        both = LabelsElsewhere(
            root,
            stream_name,
            data,
            source.labels,
            source=name,
            cache=fetch_options(data).cache,
            others_wait_s=wait_s,
            index=own,
            strict=strict,
        )
        meaning, unmatched = both.label_stream.index, both.unmatched
        stream: ShardStream = both
    else:
        stream = ShardStream(root, stream_name, data, index=own, labels=labelled, strict=strict)
    if len(stream) == 0:
        raise DataError(f"{shown(root)}: stream {stream_name!r} has no samples; training needs at least one")
    if labelled and (meaning.classes, meaning.ignore_index) != (index.classes, index.ignore_index):
        raise DataError(
            f"{shown(source.labels or root)}: its classes or its ignore_index are not those of {shown(data.root)}; "
            "write it again with an id map that gives the same"
        )
    return stream, unmatched


def _in_ranges(text: str, shards: int, name: str) -> list[int]:
    """The numbers of shards that `shards` of a source names, ascending.

    Raises:
        DataError: there are no such shards.
    """
    ranges = shard_ranges(text)
    largest = max(part[-1] for part in ranges)
    if largest >= shards:
        raise DataError(
            f"source {name!r}: shards={text}: there is no shard {largest}; its index has {shards} shards, numbered "
            f"from 0 to {shards - 1}"
        )
    return sorted({number for part in ranges for number in part})


def drawn_shards(part: float, sizes: Sequence[int] | NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Draw as few whole shards as make up a part of all samples.

    They are the first ones of an order that does not depend on the part: a smaller part is in a larger one.

    Args:
        part: 0 < part ≤ 1.
        sizes: samples of each shard; one without samples is not drawn.
        seed: of the order.

    Returns:
        int64, ascending: numbers of shards.
    """
    counts = np.asarray(sizes, dtype=np.int64)
    order = permutation(seed, len(counts))
    order = order[counts[order] > 0]
    reached = np.cumsum(counts[order])
    enough = int(np.searchsorted(reached, _share(part, int(reached[-1])))) + 1
    return np.sort(order[:enough])


def drawn_samples(part: float, count: int, seed: int) -> NDArray[np.int64]:
    """Draw a part of ``count`` samples: int64, ascending. A smaller part is in a larger one."""
    return np.sort(permutation(seed, count)[: _share(part, count)])


def _share(part: float, count: int) -> int:
    """A part of a number, rounded up; computed from the decimal number that was written."""
    return ceil(Fraction(str(part)) * count)


def _part(part: float, stream: ShardStream, numbers: NDArray[np.int64] | None, seed: int) -> NDArray[np.int64]:
    """The part of the samples that are used so far."""
    if numbers is None:
        return drawn_samples(part, len(stream), seed)
    first = np.searchsorted(numbers, stream.shards.starts)
    sizes = np.diff(first)
    if np.count_nonzero(sizes) < _MANY_SHARDS:
        return numbers[drawn_samples(part, len(numbers), seed)]
    return np.concatenate([numbers[first[shard] : first[shard + 1]] for shard in drawn_shards(part, sizes, seed)])
