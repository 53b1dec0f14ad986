"""The training stream: batches of labelled and unlabelled images, exact, and exactly continued.

Step s takes the next images of either side, and each rank its slots of the global batch, so that

* the ratio of labelled to unlabelled images is exact in every batch on every rank, and each source has its share;
* a sample's view is drawn from its place (source, epoch, number in the epoch), whoever makes it;
* the state is the number of the step and what the sources had left when their mix last changed
  (`data/order/mix.py`): a small piece of JSON, one for the whole job, which knows nothing of workers and of what
  they have read ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from maskmatch_scale.data.batches.augment import WeakView, rare_class_pixel
from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.images.decode import decode_image, decode_label
from maskmatch_scale.data.order.epoch import Cut, Place
from maskmatch_scale.data.order.mix import Leg, Part
from maskmatch_scale.data.order.source import Skip, Source
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import RawSample, ShardStream, load_index
from maskmatch_scale.recipe import Recipe, SourceRecipe
from maskmatch_scale.seeds import derive_seed, generator

log = logging.getLogger("maskmatch_scale")

STATE_FORMAT = 1


def draw_labelled(sizes: Sequence[int], count: int | None, split_seed: int) -> list[NDArray[np.int64] | None]:
    """The labelled samples a run may use: ``count`` of all sources together, drawn by ``split_seed``.

    Args:
        sizes: samples of each source.
        count: how many; None = all.
        split_seed: which.

    Returns:
        For each source the numbers of its samples, ascending; None where all are used.

    Raises:
        DataError: more asked for than there are.
    """
    if count is None:
        return [None] * len(sizes)
    total = sum(sizes)
    if count > total:
        raise DataError(f"data.labelled_count={count}: there are {total} labelled samples; ask for fewer or write more")
    drawn = torch.randperm(total, generator=generator(split_seed, "labelled split"))[:count].sort().values.numpy()
    edges = np.concatenate([[0], np.cumsum(sizes)])
    parts = np.split(drawn, np.searchsorted(drawn, edges[1:-1]))
    return [part - edge for part, edge in zip(parts, edges[:-1], strict=True)]


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch, on the host. B labelled and U unlabelled images of h × w px."""

    labelled_images: Tensor
    """uint8 (B, 3, h, w); B may be 0."""
    labels: Tensor
    """uint8 (B, h, w), ignore_index where nothing counts."""
    unlabelled_images: Tensor
    """uint8 (U, 3, h, w), the weak view; U may be 0."""
    unlabelled_valid: Tensor
    """bool (U, h, w), False on padding."""
    unlabelled_positions: tuple[int, ...]
    """A number for the place of each unlabelled image in the endless stream: what its views are drawn from."""
    skipped: tuple[Skip, ...] = ()
    """Samples that were passed over for this batch."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What :meth:`with_tensors` takes."""
        return self.labelled_images, self.labels, self.unlabelled_images, self.unlabelled_valid

    def with_tensors(self, tensors: Sequence[Tensor]) -> Batch:
        """The same batch with other memory."""
        labelled_images, labels, unlabelled_images, unlabelled_valid = tensors
        return replace(
            self,
            labelled_images=labelled_images,
            labels=labels,
            unlabelled_images=unlabelled_images,
            unlabelled_valid=unlabelled_valid,
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return self.with_tensors([tensor.to(device, non_blocking=True) for tensor in self.tensors])


@dataclass
class _Side:
    """The labelled or the unlabelled half of the mix."""

    sources: list[Source]
    per_rank: int
    """Images of a micro-batch and rank."""
    leg: Leg

    @property
    def parts(self) -> list[Part]:
        return [source.part for source in self.sources]

    @property
    def elsewhere(self) -> bool:
        return any(source.elsewhere for source in self.sources)


class TrainingStream(Dataset[Batch]):
    """Micro-batch number → :class:`Batch` of one rank. Map-style, so that any worker may make any batch.

    Args:
        recipe: sections data, engine, run and method.class_weights are read.
        num_classes: classes of the model; a label above them is a bad sample.
        rank, world_size: whose slots.
        unlabelled: whether unlabelled images are read at all.
        index: of `data.root`, if it was read already.

    Raises:
        DataError: sources that are missing, empty, or do not fit together.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        rank: int,
        world_size: int,
        *,
        unlabelled: bool,
        index: ShardIndex | None = None,
    ) -> None:
        self.recipe = recipe
        self.num_classes = num_classes
        self.rank = rank
        self.world_size = world_size
        data, micro_batch = recipe.data, recipe.engine.micro_batch
        self.index = index or load_index(data.root, data)
        self.lanes = data.lanes or world_size
        if micro_batch * world_size % self.lanes:
            raise DataError(
                f"data.lanes={self.lanes} does not divide the {micro_batch * world_size} images that {world_size} "
                f"ranks take at a time (engine.micro_batch={micro_batch}); choose a divisor, or null: one lane a rank"
            )
        self.labelled = self._side("labelled", micro_batch, 0) if data.labelled_count != 0 else None
        self.unlabelled: _Side | None = None
        if unlabelled:
            self.unlabelled = self._side("unlabelled", micro_batch * data.unlabelled_per_labelled, recipe.burn_in_steps)
        self.weak_view = WeakView(data.crop_px, data.scale_range, data.flip_probability, self.index.ignore_index)
        self._class_pixels: Tensor | None = None

    def _side(self, side: str, per_rank: int, start: int) -> _Side:
        data, seed = self.recipe.data, self.recipe.run.seed
        labels = side == "labelled"
        skip = (data.bad_labelled if labels else data.bad_unlabelled) == "skip"
        asked: tuple[SourceRecipe, ...] = getattr(data, side) or (SourceRecipe(root=data.root),)
        names = [source.name or source.stream or side for source in asked]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"data.{side}: two sources are called {twice!r}; give each a `name` of its own")
        streams = []
        for source in asked:
            index = self.index if source.root == data.root else None
            name = source.stream or side
            stream = ShardStream(source.root, name, data, index=index, labels=labels, strict=not skip)
            if len(stream) == 0:
                raise DataError(f"{source.root}: stream {name!r} has no samples; training needs at least one")
            if labels and (stream.index.classes, stream.index.ignore_index) != self._labels_of_root():
                raise DataError(
                    f"{source.root}: its classes or its ignore_index are not those of {data.root}; write it again with "
                    "an id map that gives the same"
                )
            streams.append(stream)
        used: Sequence[NDArray[np.int64] | None] = [None] * len(streams)
        if labels:
            used = draw_labelled([len(stream) for stream in streams], data.labelled_count, data.split_seed)
        sources = [
            Source(
                stream,
                name,
                derive_seed(seed, side),
                data.shuffle_window,
                weight=source.weight,
                skip=skip,
                numbers=numbers,
            )
            for stream, name, source, numbers in zip(streams, names, asked, used, strict=True)
            if numbers is None or len(numbers)
        ]
        batch = per_rank * self.world_size * self.recipe.engine.accumulation
        return _Side(sources, per_rank, Leg.first(start, self.lanes, batch, [source.part for source in sources]))

    def _labels_of_root(self) -> tuple[tuple[str, ...], int]:
        return self.index.classes, self.index.ignore_index

    @property
    def labelled_samples(self) -> int:
        """Labelled samples of an epoch: those that were drawn."""
        return sum(source.part.samples for source in self.labelled.sources) if self.labelled else 0

    @property
    def unlabelled_samples(self) -> int:
        """Unlabelled samples of an epoch."""
        return sum(source.part.samples for source in self.unlabelled.sources) if self.unlabelled else 0

    def state(self, step: int) -> dict[str, Any]:
        """What :meth:`resume` continues from after ``step`` steps: JSON, the same on every rank."""
        sides = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        return {
            "format": STATE_FORMAT,
            "step": step,
            **{name: side.leg.as_json() if side else None for name, side in sides.items()},
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken, exactly; also with other ranks, batches, sources or weights.

        Raises:
            DataError: the state cannot be read.
        """
        if state.get("format") != STATE_FORMAT:
            raise DataError(f"the checkpoint's stream state has format {state.get('format')}; {STATE_FORMAT} is read")
        step = int(state["step"])
        for name, side in (("labelled", self.labelled), ("unlabelled", self.unlabelled)):
            if side is None:
                continue
            start = self.recipe.burn_in_steps if name == "unlabelled" else 0
            if state[name] is None:  # a side that the run did not have
                side.leg = Leg.first(max(start, step), self.lanes, side.leg.batch, side.parts)
                continue
            old = Leg.from_json(state[name])
            for changed in old.changed(side.parts):
                log.warning("%s source %r is not as it was at step %d: it begins a new epoch", name, changed, step)
            side.leg = old.next(step, start, self.lanes, side.leg.batch, side.parts)

    def class_pixels(self) -> Tensor:
        """Pixels of each class in the drawn labelled samples: int64 (classes,); reads them if they were not counted."""
        if self._class_pixels is None:
            self._class_pixels = self._count_class_pixels(0, 1)
        return self._class_pixels

    def count_class_pixels(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Count them on all ranks, each its share of the samples; all must call it together."""
        self._class_pixels = sum_over_ranks(self._count_class_pixels(self.rank, self.world_size))

    def _count_class_pixels(self, rank: int, world_size: int) -> Tensor:
        total = torch.zeros(self.num_classes, dtype=torch.int64)
        for source in self.labelled.sources if self.labelled else []:
            numbers = range(len(source.stream)) if source.numbers is None else source.numbers.tolist()
            cut = Cut(len(numbers), world_size)
            for number in numbers[cut.start(rank) : cut.start(rank + 1)]:
                try:
                    label = self._label(source.stream[number])
                except BadSample:
                    if not source.skip:
                        raise
                    continue
                total += torch.bincount(label.flatten(), minlength=256)[: self.num_classes]
        return total

    def __getitem__(self, number: int) -> Batch:
        """Micro-batch ``number`` of the run (step · accumulation + micro-step)."""
        skipped: list[Skip] = []
        images, labels, views, valid = self._empty(0, 0).tensors
        positions: list[int] = []
        if self.labelled is not None:
            made = [
                self._labelled_view(source, place, skipped) for source, place in self._places(self.labelled, number)
            ]
            images, labels = (torch.stack(maps) for maps in zip(*made, strict=True))
        # A batch of the burn-in is numbered like any other; its unlabelled images come later.
        burning_in = number // self.recipe.engine.accumulation < self.recipe.burn_in_steps
        if self.unlabelled is not None and not burning_in:
            places = list(self._places(self.unlabelled, number))
            drawn = [self._unlabelled_view(source, place, skipped) for source, place in places]
            views, valid = (torch.stack(maps) for maps in zip(*drawn, strict=True))
            seed = self.recipe.run.seed
            positions = [derive_seed(seed, "place", source.name, p.epoch, p.place) for source, p in places]
        return Batch(images, labels, views, valid, tuple(positions), tuple(skipped))

    def largest_batch(self) -> Batch:
        """A batch as large as any of this rank, of whatever values."""
        return self._empty(*(side.per_rank if side else 0 for side in (self.labelled, self.unlabelled)))

    def _empty(self, labelled: int, unlabelled: int) -> Batch:
        rows, columns = self.recipe.data.crop_px
        return Batch(
            torch.empty(labelled, 3, rows, columns, dtype=torch.uint8),
            torch.empty(labelled, rows, columns, dtype=torch.uint8),
            torch.empty(unlabelled, 3, rows, columns, dtype=torch.uint8),
            torch.empty(unlabelled, rows, columns, dtype=torch.bool),
            (),
        )

    def _places(self, side: _Side, number: int) -> Iterator[tuple[Source, Place]]:
        """Where this rank's images of a micro-batch stand: its slots of the global batch, each of a lane."""
        accumulation, leg = self.recipe.engine.accumulation, side.leg
        step, micro = divmod(number, accumulation)
        each = leg.a_lane // accumulation
        for slot in range(self.rank * side.per_rank, (self.rank + 1) * side.per_rank):
            lane, within = divmod(slot, each)
            source, place = leg.at(step, lane, micro * each + within)
            if side.elsewhere:
                self._prefetch(side, step, lane, micro * each + within)
            yield side.sources[source], place

    def _prefetch(self, side: _Side, step: int, lane: int, number: int) -> None:
        """Have fetched what a lane needs: now, which it has but for the first time, and half a window later."""
        ahead = min(self.recipe.data.shuffle_window, max(part.samples for part in side.parts) // self.lanes) // 2
        for due in (step, step + 1 + ahead // side.leg.a_lane):
            if due < self.recipe.run.steps:  # a run that ends reads no more than it needs
                source, place = side.leg.at(due, lane, number)
                side.sources[source].prefetch(place)

    def _labelled_view(self, source: Source, place: Place, skipped: list[Skip]) -> tuple[Tensor, Tensor]:
        """A labelled image and its label map; what was passed over for it is added to ``skipped``."""

        def decode(raw: RawSample) -> tuple[Tensor, Tensor]:
            image = decode_image(raw.image, raw.name, max_pixels=self.recipe.data.max_image_px, contiguous=False)
            return image, self._label(raw, (image.shape[-2], image.shape[-1]))

        (image, label), passed = source.load(place, decode)
        skipped.extend(passed)
        draws = generator(self.recipe.run.seed, "labelled view", source.name, place.epoch, place.place)
        around = None
        if float(torch.rand((), generator=draws)) < self.recipe.data.rare_class_crops:
            weight = self.class_pixels().clamp(min=1).double().rsqrt() * (self.class_pixels() > 0)
            around = rare_class_pixel(label, weight, draws)
        view, target, _ = self.weak_view(image, label, draws, around)
        assert target is not None
        return view, target

    def _unlabelled_view(self, source: Source, place: Place, skipped: list[Skip]) -> tuple[Tensor, Tensor]:
        """An unlabelled image and where it is no padding, likewise."""
        data = self.recipe.data
        image, passed = source.load(
            place,
            lambda raw: decode_image(
                raw.image,
                raw.name,
                max_pixels=data.max_image_px,
                exif_orientation=data.exif_orientation,
                contiguous=False,
            ),
        )
        skipped.extend(passed)
        draws = generator(self.recipe.run.seed, "unlabelled view", source.name, place.epoch, place.place)
        view, _, valid = self.weak_view(image, None, draws)
        return view, valid

    def _label(self, raw: RawSample, size: tuple[int, int] | None = None) -> Tensor:
        assert raw.label is not None
        return decode_label(
            raw.label, raw.name, num_classes=self.num_classes, ignore_index=self.index.ignore_index, size=size
        )
