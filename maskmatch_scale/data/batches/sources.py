"""The labelled and the unlabelled sources of a run, as its recipe names them: checked, opened, and mixed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.batches.choosing import choice_of, choose, drawn_samples
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.bands import RGB_NAMES, Band, in_words
from maskmatch_scale.data.order.epoch import permutation
from maskmatch_scale.data.order.mix import Leg, SourceInfo
from maskmatch_scale.data.order.patience import Patience
from maskmatch_scale.data.order.sequential import Deal, SequentialSource
from maskmatch_scale.data.order.source import WeightedSource
from maskmatch_scale.data.remote.patterns import expand
from maskmatch_scale.data.shards.folder import channels_of, fetch_options
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.recipe import DataRecipe, Recipe, SourceRecipe
from maskmatch_scale.recipe.where import Where
from maskmatch_scale.redact import is_remote, shown
from maskmatch_scale.seeds import derive_seed

log = logging.getLogger("maskmatch_scale")

SideName = Literal["labelled", "unlabelled"]


@dataclass
class Side:
    """The labelled or the unlabelled sources of a run, and their mix.

    Attributes:
        name: which of the two.
        sources: in the order of the recipe.
        per_rank: images of a rank in one micro-batch.
        start: the first step that takes images of this side.
        leg: the mix, as it is now.
        notes: what the recipe chose of each source, for people.
    """

    name: SideName
    sources: list[WeightedSource | SequentialSource]
    per_rank: int
    start: int
    leg: Leg
    notes: list[str] = field(default_factory=list)

    @property
    def indexed(self) -> list[WeightedSource]:
        """The sources with an index."""
        return [source for source in self.sources if isinstance(source, WeightedSource)]

    @property
    def sequential(self) -> list[SequentialSource]:
        """The sources without one."""
        return [source for source in self.sources if isinstance(source, SequentialSource)]

    @property
    def samples(self) -> int | None:
        """Samples of an epoch of all sources together; None if a source has no index."""
        return None if self.sequential else sum(source.info.samples for source in self.sources)

    @property
    def is_remote(self) -> bool:
        """Whether shards of some source with an index have to be fetched."""
        return any(source.is_remote for source in self.indexed)

    def resume(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Continue after ``step`` steps.

        Args:
            state: what ``leg.as_json`` returned then; None if the run did not have this side.
            step: steps that were made.

        Raises:
            DataError: the state cannot be read.
        """
        infos, lanes, batch = _infos(self.sources), self.leg.lanes, self.leg.batch
        if state is None:
            self.leg = Leg.first(max(self.start, step), lanes, batch, infos)
            return
        old = Leg.from_json(state)
        for changed in old.changed(infos):
            log.warning("%s source %r is not as it was at step %d: it begins a new epoch", self.name, changed, step)
        self.leg = old.next(step, self.start, lanes, batch, infos)


def open_side(
    name: SideName, recipe: Recipe, index: ShardIndex, lanes: int, deal: Deal, world_size: int, patience: Patience
) -> Side:
    """Open the sources of one side, and mix them from the beginning.

    Args:
        name: which side.
        recipe: sections data, engine, run and method are read.
        index: of ``data.root``.
        lanes: see :func:`count_lanes`.
        deal: lanes of sources without an index.
        world_size: number of ranks.
        patience: how long a process may wait for shards that do not come.

    Raises:
        DataError: a source is missing or empty, or sources do not fit together.
    """
    data, engine = recipe.data, recipe.engine
    labelled = name == "labelled"
    skip = (data.bad_labelled if labelled else data.bad_unlabelled) == "skip"
    wanted: tuple[SourceRecipe, ...] = getattr(data, name) or (SourceRecipe(root=data.root),)
    names = [source.name or source.stream or name for source in wanted]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"data.{name}: two sources are called {twice!r}; give each a `name` of its own")
    chosen = [
        None if source.is_sequential else choose(source, name, called, recipe, index, strict=not skip)
        for source, called in zip(wanted, names, strict=True)
    ]
    notes = [one.note for one in chosen if one is not None and one.note is not None]
    drawn_of: Sequence[NDArray[np.int64] | None] = [None] * len(chosen)
    if labelled:
        drawn_of = draw_labelled([len(one) for one in chosen if one is not None], data.labelled_count, data.split_seed)
    seed = derive_seed(recipe.run.seed, name)
    sources: list[WeightedSource | SequentialSource] = []
    for one, source_name, source, drawn in zip(chosen, names, wanted, drawn_of, strict=True):
        if one is None:
            sequential, note = _open_sequential(source, source_name, seed, recipe, deal, patience)
            sources.append(sequential)
            notes += [note] if note is not None else []
        elif drawn is None or len(drawn):
            sources.append(
                WeightedSource(
                    one.stream,
                    source_name,
                    seed,
                    data.shuffle_window,
                    weight=source.weight,
                    skip=skip,
                    numbers=one.numbers if drawn is None else drawn if one.numbers is None else one.numbers[drawn],
                    patience=patience,
                )
            )
    per_rank = engine.micro_batch * (1 if labelled else data.unlabelled_per_labelled)
    start = 0 if labelled else recipe.burn_in_steps
    leg = Leg.first(start, lanes, per_rank * world_size * engine.accumulation, _infos(sources))
    return Side(name, sources, per_rank, start, leg, notes)


def _open_sequential(
    source: SourceRecipe, name: str, seed: int, recipe: Recipe, deal: Deal, patience: Patience
) -> tuple[SequentialSource, str | None]:
    """A source without an index; and what the recipe chose of it, for people.

    Raises:
        DataError: its pattern matches nothing, is a folder, or names a shard twice; or a part of one shard is wanted.
    """
    data = recipe.data
    assert source.shards is not None
    shards = expand(source.shards)
    if len(shards) == 1 and not is_remote(shards[0]) and Path(shards[0]).is_dir():
        raise DataError(
            f"source {name!r}: {shards[0]} is a folder; name its shards ({shards[0].rstrip('/')}/*.tar), or give it as "
            "`root` if it has an index"
        )
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise DataError(f"source {name!r}: {shown(twice)} is listed twice")
    used, choice = shards, choice_of(source)
    if source.part < 1:
        if len(shards) == 1:
            raise DataError(
                f"source {name!r}: part={source.part:g} of a single shard: of shards without an index whole ones are "
                "taken; name more of them, or index it (`maskmatch shards index`)"
            )
        drawn = drawn_samples(source.part, len(shards), derive_seed(data.split_seed, "part", name))
        used = [shards[number] for number in drawn.tolist()]
    note = f"unlabelled source {name!r}: {len(used)} of {len(shards)} shards ({choice})"
    opened = SequentialSource(
        used,
        name,
        seed,
        data.shuffle_window,
        fetch_options(data),
        deal,
        weight=source.weight,
        skip=data.bad_unlabelled == "skip",
        patience=patience,
        where=None if source.where is None else Where(source.where),
    )
    return opened, note if choice else None


def common_channels(data: DataRecipe, index: ShardIndex, sides: Iterable[Side | None]) -> tuple[str, ...]:
    """The names of the channels of a run, by channel, which every source has.

    A source whose index has other ranges of values keeps them; its side then has a note that says so.

    Args:
        data: the section of the recipe.
        index: of ``data.root``.
        sides: of the run; None where there is none.

    Raises:
        DataError: a source lacks one, or has no index that would say.
    """
    channels = channels_of(index, data)
    names = RGB_NAMES if channels is None else channels.names
    for side in sides:
        for source in side.indexed if side else ():
            own = channels_of(source.stream.index, data, source.stream.root, names)
            if side and own and channels and own.bands != channels.bands:
                side.notes.append(_other_ranges(source.name, own.bands, channels.bands))
        if side and side.sequential and channels is not None:
            raise DataError(
                f"source {side.sequential[0].name!r} has no index, so nobody knows its bands, and {', '.join(names)} "
                "are wanted; index it (`maskmatch shards index --bands`)"
            )
    return names


def _other_ranges(name: str, own: Sequence[Band], bands: Sequence[Band]) -> str:
    differ = [(one, other) for one, other in zip(own, bands, strict=True) if one != other]
    theirs, ours = (", ".join(in_words(each)) for each in zip(*differ, strict=True))
    return (
        f"warning: source {name!r} has other ranges of values than data.root: {theirs}, not {ours}; if both measure "
        "the same, give all the same by data.value_ranges"
    )


def _infos(sources: Sequence[WeightedSource | SequentialSource]) -> list[SourceInfo]:
    return [source.info for source in sources]


def count_lanes(recipe: Recipe, world_size: int) -> int:
    """Number of lanes: ``data.lanes``, or one per rank.

    Decision: docs/decisions/0005-lanes-by-ranks.md.

    Raises:
        DataError: it does not divide the images of a micro-batch over all ranks.
    """
    data, micro_batch = recipe.data, recipe.engine.micro_batch
    lanes = data.lanes or world_size
    if micro_batch * world_size % lanes:
        raise DataError(
            f"data.lanes={lanes} does not divide the {micro_batch * world_size} images that {world_size} "
            f"ranks take at a time (engine.micro_batch={micro_batch}); choose a divisor, or null: one lane a rank"
        )
    return lanes


def draw_labelled(sizes: Sequence[int], count: int | None, split_seed: int) -> list[NDArray[np.int64] | None]:
    """Draw the labelled samples that a run may use, from all sources together.

    Args:
        sizes: samples of each source.
        count: how many are drawn; None = all are used.
        split_seed: seed of the draw.

    Returns:
        For each source the numbers of its drawn samples, int64, ascending; None where all are used.

    Raises:
        DataError: more are wanted than there are.
    """
    if count is None:
        return [None] * len(sizes)
    total = sum(sizes)
    if count > total:
        raise DataError(f"data.labelled_count={count}: there are {total} labelled samples; ask for fewer or write more")
    # By numpy's Philox, which stays the same: which samples have labels must not change with torch's version.
    drawn = np.sort(permutation(derive_seed(split_seed, "labelled split"), total)[:count])
    edges = np.concatenate([[0], np.cumsum(sizes)])
    parts = np.split(drawn, np.searchsorted(drawn, edges[1:-1]))
    return [part - edge for part, edge in zip(parts, edges[:-1], strict=True)]
