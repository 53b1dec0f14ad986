"""The training batches of one rank: exact in their mix, and continued exactly.

Step s takes the next images of each side, labelled and unlabelled. The global batch of a side has one slot per image,
and each rank has its own slots of it. So

* the ratio of labelled to unlabelled images is exact in every batch on every rank, and each source has its share;
* the view of a sample is drawn from its place (source, epoch, number in the epoch), whichever process makes it;
* the state is the number of the step, and what each source had left when the mix last changed
  (:mod:`~maskmatch_scale.data.order.mix`). It is a small piece of JSON, the same on all ranks. It does not depend on
  loader processes, nor on the batches that they have made ahead;
* sources without an index are read in sequence (:mod:`~maskmatch_scale.data.order.lane`). Where their lanes are is part
  of the state; each rank knows that of its own lanes.

Decision: docs/decisions/0030-a-stream-is-a-list-of-shards.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.data.batches.class_pixels import ClassPixels
from maskmatch_scale.data.batches.dealing import check_shards, check_turns, continue_lanes, deal_lanes, state_of
from maskmatch_scale.data.batches.sources import Side, common_channels, count_lanes, open_side
from maskmatch_scale.data.batches.views import SampleViews, label_map
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order.lane import LaneState
from maskmatch_scale.data.order.patience import Patience
from maskmatch_scale.data.order.queue import SamplePlace
from maskmatch_scale.data.order.sequential import SequentialSource
from maskmatch_scale.data.order.source import Skip, WeightedSource
from maskmatch_scale.data.remote.shard_cache import Fetched
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.seeds import derive_seed

STATE_FORMAT = 1


class Draw(Protocol):
    """Draws numbers for images; picklable."""

    @property
    def width(self) -> int:
        """Numbers for each image."""

    def __call__(self, positions: Sequence[int]) -> Tensor:
        """float64 (U, width), in host memory, of U positions; see `Batch.positions`."""


class _Unlabelled(NamedTuple):
    """An unlabelled image of a batch: its source and place, its view, and what was skipped for it."""

    source: WeightedSource | SequentialSource
    place: SamplePlace
    view: Tensor
    """uint8 (C, h + 2 m, w + 2 m)."""
    valid: Tensor
    """bool (h, w)."""
    skipped: list[Skip]


class TrainingBatches(Dataset[Batch]):
    """Maps the number of a micro-batch to one rank's :class:`Batch`. Any process may make any batch.

    With sources without an index this holds no longer: batches n, n + K, n + 2 K, … have to be made in this order by
    one process (:mod:`~maskmatch_scale.data.batches.dealing`), and :meth:`took` must be called for those that are used.

    Args:
        recipe: sections data, engine, run and method are read.
        num_classes: classes of the model; a sample with a label value from here on, except the ignored one, is bad.
        rank: whose batches.
        world_size: number of ranks.
        unlabelled: whether unlabelled images are read at all.
        draw: draws what the method needs for unlabelled images, or after the burn-in for labelled ones if no unlabelled
            ones are read; None: nothing is drawn.
        index: of ``data.root``, if it was read already.

    Raises:
        DataError: a source is missing or empty, or lacks a channel; sources do not fit together; or lanes do not divide
            the batch.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        rank: int,
        world_size: int,
        *,
        unlabelled: bool,
        draw: Draw | None = None,
        index: ShardIndex | None = None,
    ) -> None:
        self.recipe = recipe
        self.rank = rank
        self.world_size = world_size
        self.index = index or load_index(recipe.data.root, recipe.data)
        self._draw = draw
        self.lanes = count_lanes(recipe, world_size)
        patience = Patience(outage_s(recipe))
        self._deal = deal_lanes(recipe, world_size)
        self.labelled: Side | None = None
        """None where ``data.labelled_count`` is 0."""
        if recipe.data.labelled_count != 0:
            self.labelled = open_side("labelled", recipe, self.index, self.lanes, self._deal, world_size, patience)
        self.unlabelled: Side | None = None
        """None where no unlabelled images are read."""
        if unlabelled:
            self.unlabelled = open_side("unlabelled", recipe, self.index, self.lanes, self._deal, world_size, patience)
            self._check_lanes()
        self.channel_names = common_channels(recipe.data, self.index, (self.labelled, self.unlabelled))
        """What the images of a batch have, by channel."""
        ignore_index = self.index.ignore_index
        self._class_pixels = ClassPixels(
            self.labelled.indexed if self.labelled else [],
            num_classes,
            partial(label_map, num_classes=num_classes, ignore_index=ignore_index),
        )
        self._views = SampleViews(recipe, num_classes, ignore_index, self.channel_names, self._class_pixels.total)

    @property
    def labelled_samples(self) -> int:
        """Labelled samples of an epoch: those that were drawn."""
        return sum(source.info.samples for source in self.labelled.indexed) if self.labelled else 0

    @property
    def unlabelled_samples(self) -> int | None:
        """Unlabelled samples of an epoch; None if a source has no index."""
        return self.unlabelled.samples if self.unlabelled else 0

    @property
    def sequential(self) -> list[SequentialSource]:
        """The sources without an index."""
        return self.unlabelled.sequential if self.unlabelled else []

    @property
    def notes(self) -> list[str]:
        """What the recipe chose of sources of which it does not use all, in a line each."""
        return [note for side in (self.labelled, self.unlabelled) if side is not None for note in side.notes]

    def state(self, step: int) -> dict[str, Any]:
        """What :meth:`resume` continues from after ``step`` steps: JSON, the same on every rank.

        Under `ranks` it takes what :meth:`own_state` of each rank returned, in their order.
        """
        state = {
            "format": STATE_FORMAT,
            "step": step,
            "labelled": self.labelled.leg.as_json() if self.labelled else None,
            "unlabelled": self.unlabelled.leg.as_json() if self.unlabelled else None,
        }
        return state | ({"sequential": state_of(self._deal)} if self.sequential else {})

    def own_state(self) -> dict[str, Any] | None:
        """What this rank alone knows: where its lanes are after the batches that were taken, as JSON; None: nothing."""
        if not self.sequential:
            return None
        each = self._deal.lanes // self.world_size
        own = range(self.rank * each, (self.rank + 1) * each)
        return {"lanes": {s.name: {str(lane): s.states[lane].as_json() for lane in own} for s in self.sequential}}

    def took(self, batch: Batch) -> None:
        """Note where lanes are after a batch that was taken, which another process may have made."""
        sources = {source.name: source for source in self.sequential}
        for name, lane, state in batch.lanes:
            sources[name].took(lane, state)

    def close(self) -> None:
        """Close the shards that this process reads in sequence; they are opened again for further batches."""
        for source in self.sequential:
            source.close()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state`` was taken, also with other ranks, batches, sources or weights.

        Raises:
            DataError: the state cannot be read.
        """
        if state.get("format") != STATE_FORMAT:
            raise DataError(f"the checkpoint's stream state has format {state.get('format')}; {STATE_FORMAT} is read")
        step = int(state["step"])
        if self.sequential:
            self._continue_lanes(state)
        for side in (self.labelled, self.unlabelled):
            if side is not None:
                side.resume(state[side.name], step)
        self._check_lanes()

    def _continue_lanes(self, state: Mapping[str, Any]) -> None:
        self._deal = deal_lanes(self.recipe, self.world_size, state.get("sequential"))
        before = {source["name"]: source["content"] for source in (state["unlabelled"] or {}).get("sources", ())}
        for source in self.sequential:
            continue_lanes(source, self._deal, before.get(source.name), state.get("ranks", ()))

    def _check_lanes(self) -> None:
        """Refuse lanes without shards, and those that never have a turn."""
        side = self.unlabelled
        if side is not None and side.sequential:
            check_shards(side.sequential, self._deal)
            check_turns(side, self._deal, self.world_size, self.recipe.engine.accumulation)

    def class_pixels(self) -> Tensor:
        """Pixels of each class in the drawn labelled samples: int64 (classes,). Reads them if they were not counted."""
        return self._class_pixels.total()

    def label_warnings(self, classes: Sequence[str]) -> list[str]:
        """What is wrong with the pixels of these classes, as far as it is known: see :meth:`ClassPixels.warnings`."""
        return self._class_pixels.warnings(classes)

    def count_class_pixels(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Count them now, each rank a share of the samples. All ranks must call it together.

        Args:
            sum_over_ranks: sums an int64 (classes,) over all ranks.
        """
        self._class_pixels.count_on_all_ranks(self.rank, self.world_size, sum_over_ranks)

    def __getitem__(self, number: int) -> Batch:
        """Micro-batch ``number`` of the run, in memory of its own; see :meth:`make`."""
        return self.make(number)

    def make(self, number: int, memory: Batch | None = None) -> Batch:
        """Micro-batch ``number`` of the run: step · accumulation + micro-step.

        Args:
            number: of the micro-batch.
            memory: a batch at least as large, whose tensors are overwritten: those that are returned are the beginnings
                of its own. None: new memory. Each view is copied there when it is made, and not once more with others.

        Raises:
            DataError: a sample cannot be used, and it may not be skipped or nothing can replace it.
        """
        step = number // self.recipe.engine.accumulation
        labelled = self.labelled
        unlabelled = self.unlabelled if self.unlabelled is not None and step >= self.unlabelled.start else None
        sizes = [side.per_rank if side else 0 for side in (labelled, unlabelled)]
        memory = memory or self._empty(*sizes)
        images, labels = memory.labelled_images[: sizes[0]], memory.labels[: sizes[0]]
        views, valid = memory.unlabelled_images[: sizes[1]], memory.unlabelled_valid[: sizes[1]]
        skipped: list[Skip] = []
        positions: list[int] = []
        lanes: dict[tuple[str, int], LaneState] = {}
        if labelled is not None:
            places = list(self.places(labelled, number))
            for row, (source, place) in enumerate(places):
                images[row], labels[row], skips = self._views.labelled(source, place)
                skipped += skips
            if self.unlabelled is None and self._draw is not None and step >= self.recipe.burn_in_steps:
                positions = self._positions("labelled place", places)
        if unlabelled is not None:
            taken: list[tuple[WeightedSource | SequentialSource, SamplePlace]] = []
            for row, one in enumerate(self._unlabelled(unlabelled, number, lanes)):
                views[row], valid[row] = one.view, one.valid
                skipped += one.skipped
                taken.append((one.source, one.place))
            positions = self._positions("place", taken)
        elif self.unlabelled is not None:
            self._prefetch_side(self.unlabelled, number)
        draws = memory.draws[: len(positions)]
        if positions and self._draw is not None:
            draws.copy_(self._draw(positions))
        found = tuple((name, lane, where) for (name, lane), where in lanes.items())
        return Batch(images, labels, views, valid, draws, tuple(positions), tuple(skipped), self._take_figures(), found)

    def _unlabelled(self, side: Side, number: int, lanes: dict[tuple[str, int], LaneState]) -> Iterator[_Unlabelled]:
        """The unlabelled images of micro-batch ``number``; notes in ``lanes`` where its lanes are after them."""
        each = self._deal.lanes // self.world_size
        lane = self.rank * each + number % each
        for source, place in self._turns(side, number):
            if isinstance(source, SequentialSource):
                view, valid, skipped, place, lanes[source.name, lane] = self._views.next_unlabelled(source, lane)
            else:
                view, valid, skipped = self._views.unlabelled(source, place)
            yield _Unlabelled(source, place, view, valid, skipped)

    def _positions(
        self, purpose: str, places: Sequence[tuple[WeightedSource | SequentialSource, SamplePlace]]
    ) -> list[int]:
        return [derive_seed(self.recipe.run.seed, purpose, source.name, p.epoch, p.place) for source, p in places]

    def _take_figures(self) -> Fetched:
        sides = (self.labelled, self.unlabelled)
        return sum((source.take_figures() for side in sides if side for source in side.sources), Fetched())

    def largest_batch(self) -> Batch:
        """A batch of uninitialised memory, as large as any of this rank."""
        return self._empty(*(side.per_rank if side else 0 for side in (self.labelled, self.unlabelled)))

    def _empty(self, labelled: int, unlabelled: int) -> Batch:
        drawn = self._draw.width if self._draw else 0
        margin_px = self.recipe.method.teacher_margin_px
        channels = len(self.channel_names)
        return Batch.empty(labelled, unlabelled, self.recipe.data.crop_px, drawn, margin_px, channels)

    def places(self, side: Side, number: int) -> Iterator[tuple[WeightedSource, SamplePlace]]:
        """The source and place of each of this rank's images of one side in micro-batch ``number``.

        Images of sources without an index are left out: their places are known when they are read.
        """
        for source, place in self._turns(side, number):
            if isinstance(source, WeightedSource):
                yield source, place

    def _turns(self, side: Side, number: int) -> Iterator[tuple[WeightedSource | SequentialSource, SamplePlace]]:
        """The source of each of this rank's images of one side in micro-batch ``number``; and their places in it, which
        mean nothing in a source without an index.
        """
        step = number // self.recipe.engine.accumulation
        for lane, within in self._slots(side, number):
            source, place = side.leg.at(step, lane, within)
            if side.is_remote:
                self._prefetch(side, step, lane, within)
            yield side.sources[source], place

    def _slots(self, side: Side, number: int) -> Iterator[tuple[int, int]]:
        """(lane, number among the images of the lane in this step) of each of this rank's slots in a micro-batch.

        A rank has its own slots of the global batch, and each slot belongs to a lane.
        """
        accumulation = self.recipe.engine.accumulation
        each = side.leg.per_lane // accumulation
        for slot in range(self.rank * side.per_rank, (self.rank + 1) * side.per_rank):
            lane, within = divmod(slot, each)
            yield lane, number % accumulation * each + within

    def _prefetch_side(self, side: Side, number: int) -> None:
        """Fetch shards of a side in the background that takes no images in micro-batch ``number`` yet."""
        if side.is_remote:
            for lane, within in self._slots(side, number):
                self._prefetch(side, number // self.recipe.engine.accumulation, lane, within)

    def _prefetch(self, side: Side, step: int, lane: int, number: int) -> None:
        """Fetch shards in the background: those of the window that a lane is in, and of the one half a window later.

        The former are there already, except when a run begins or continues. Where a side takes its first images only
        half a window from now or sooner, the shards of its first window are fetched.

        Args:
            side: of the image.
            step: of the image.
            lane: of the image.
            number: of the image, among those of the lane in this step.
        """
        samples = max(source.info.samples for source in side.indexed)
        ahead = min(self.recipe.data.shuffle_window, samples // self.lanes) // 2
        for due in (step, step + 1 + ahead // side.leg.per_lane):
            # Nothing is fetched that is needed only after the end of the run.
            if max(side.start, side.leg.start) <= due < self.recipe.run.steps:
                number_of_source, place = side.leg.at(due, lane, number)
                source = side.sources[number_of_source]
                if isinstance(source, WeightedSource):
                    source.prefetch(place)


def outage_s(recipe: Recipe) -> float:
    """`data.outage_s` in seconds, or a quarter of `engine.collective_timeout_s`."""
    return recipe.data.outage_s or recipe.engine.collective_timeout_s / 4
