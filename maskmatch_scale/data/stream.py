"""The training stream: which sample comes when, and batches made of them.

The order of a stream is a pure function of (seed, epoch, number of samples): position n of an endless stream is sample
``permutation(seed, n // N)[n % N]``. Step s takes the next positions of the labelled and of the unlabelled stream, and
each rank its slice of them, so that

* the mix is exact in every batch on every rank,
* one rank with a batch of 4 and two ranks with 2 see the same global batch,
* the state of the stream is the step number: continuing needs nothing else, whatever the workers had prefetched.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskmatch_scale.data.augment import WeakView, rare_class_pixel
from maskmatch_scale.data.decode import decode_image, decode_label
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards import RawSample, ShardStream
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.seeds import derive_seed, generator


@dataclass(frozen=True)
class Order:
    """Endless, shuffled anew each epoch: position → sample number.

    Args:
        samples: the sample numbers of one epoch.
        seed: of the run.
        stream: name of the stream, so that two streams of one length differ.
    """

    samples: Sequence[int]
    seed: int
    stream: str

    def __getitem__(self, position: int) -> int:
        """Sample number at ``position`` ≥ 0."""
        epoch, place = divmod(position, len(self.samples))
        shuffled = _permutation(derive_seed(self.seed, "order", self.stream, epoch), len(self.samples))
        return self.samples[int(shuffled[place])]


@lru_cache(maxsize=4)
def _permutation(seed: int, length: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def draw_labelled(stream: ShardStream, count: int | None, split_seed: int) -> list[int]:
    """The labelled samples a run may use: ``count`` drawn by ``split_seed``, in stream order.

    Raises:
        DataError: more asked for than there are.
    """
    if count is None:
        return list(range(len(stream)))
    if count > len(stream):
        raise DataError(
            f"data.labelled_count={count}: stream {stream.name!r} of {stream.root} has {len(stream)} samples; "
            "ask for fewer or write more"
        )
    drawn = torch.randperm(len(stream), generator=generator(split_seed, "labelled split"))[:count]
    return sorted(drawn.tolist())


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch, on the host. B labelled and U unlabelled images of h × w px."""

    labelled_images: Tensor
    """uint8 (B, 3, h, w)."""
    labels: Tensor
    """int64 (B, h, w), ignore_index where nothing counts."""
    unlabelled_images: Tensor
    """uint8 (U, 3, h, w), the weak view; U may be 0."""
    unlabelled_valid: Tensor
    """bool (U, h, w), False on padding."""
    unlabelled_positions: tuple[int, ...]
    """Place of each unlabelled image in the endless stream: what its views are drawn from."""

    def pin_memory(self) -> Batch:
        """Page-locked copies, for the loader's asynchronous transfer to a GPU."""
        return Batch(
            self.labelled_images.pin_memory(),
            self.labels.pin_memory(),
            self.unlabelled_images.pin_memory(),
            self.unlabelled_valid.pin_memory(),
            self.unlabelled_positions,
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            self.labelled_images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.unlabelled_images.to(device, non_blocking=True),
            self.unlabelled_valid.to(device, non_blocking=True),
            self.unlabelled_positions,
        )


class TrainingStream(Dataset[Batch]):
    """Micro-batch number → :class:`Batch` of one rank. Map-style, so that any worker may make any batch.

    Args:
        recipe: sections data, engine, run and method.class_weights are read.
        num_classes: classes of the model; a label above them is an error.
        rank, world_size: whose slice.
        unlabelled: whether unlabelled images are read at all.
    """

    def __init__(self, recipe: Recipe, num_classes: int, rank: int, world_size: int, *, unlabelled: bool) -> None:
        self.recipe = recipe
        self.num_classes = num_classes
        self.rank = rank
        self.world_size = world_size
        root, seed = recipe.data.root, recipe.run.seed
        self.labelled = ShardStream(root, "labelled")
        self.drawn = draw_labelled(self.labelled, recipe.data.labelled_count, recipe.data.split_seed)
        self.labelled_order = Order(self.drawn, seed, "labelled")
        self.unlabelled = ShardStream(root, "unlabelled") if unlabelled else None
        for stream in (self.labelled, self.unlabelled):
            if stream is None:
                continue
            if len(stream) == 0:
                raise DataError(f"{stream.root}: stream {stream.name!r} has no samples; training needs at least one")
            if len(stream.entry.shards) < world_size:
                raise DataError(
                    f"{stream.root}: stream {stream.name!r} has {len(stream.entry.shards)} shards for {world_size} "
                    "ranks; write it with at least one shard a rank, or launch fewer ranks"
                )
        self.unlabelled_order = Order(range(len(self.unlabelled)), seed, "unlabelled") if self.unlabelled else None
        self.weak_view = WeakView(
            recipe.data.crop_px, recipe.data.scale_range, recipe.data.flip_probability, self.labelled.index.ignore_index
        )
        self._class_pixels: Tensor | None = None

    def class_pixels(self) -> Tensor:
        """Pixels of each class in the drawn labelled samples: int64 (classes,). Reads them once."""
        if self._class_pixels is None:
            total = torch.zeros(self.num_classes, dtype=torch.int64)
            for number in self.drawn:
                label = self._label(self.labelled[number])
                total += torch.bincount(label.flatten().long(), minlength=256)[: self.num_classes]
            self._class_pixels = total
        return self._class_pixels

    def __getitem__(self, number: int) -> Batch:
        """Micro-batch ``number`` of the run (step · accumulation + micro-step)."""
        data, size = self.recipe.data, self.recipe.engine.micro_batch
        labelled = [self._labelled_view(position) for position in self._positions(number, size)]
        positions: tuple[int, ...] = ()
        views: list[tuple[Tensor, Tensor, Tensor]] = []
        # A batch of the burn-in is numbered like any other; its unlabelled images are just not read.
        burning_in = number // self.recipe.engine.accumulation < self.recipe.burn_in_steps
        if self.unlabelled is not None and not burning_in:
            positions = tuple(self._positions(number, size * data.unlabelled_per_labelled))
            views = [self._unlabelled_view(position) for position in positions]
        rows, columns = data.crop_px
        return Batch(
            torch.stack([image for image, _, _ in labelled]),
            torch.stack([label for _, label, _ in labelled]),
            torch.stack([image for image, _, _ in views]) if views else torch.empty(0, 3, rows, columns),
            torch.stack([valid for _, _, valid in views]) if views else torch.empty(0, rows, columns, dtype=torch.bool),
            positions,
        )

    def _positions(self, number: int, size: int) -> range:
        start = (number * self.world_size + self.rank) * size
        return range(start, start + size)

    def _labelled_view(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        raw = self.labelled[self.labelled_order[position]]
        image, label = decode_image(raw.image, f"{raw.shard}: {raw.key}"), self._label(raw)
        if image.shape[-2:] != label.shape:
            raise DataError(
                f"{raw.shard}: {raw.key}: the image is {tuple(image.shape[-2:])} px, its label map {tuple(label.shape)}"
            )
        source = generator(self.recipe.run.seed, "labelled view", position)
        around = None
        if float(torch.rand((), generator=source)) < self.recipe.data.rare_class_crops:
            weight = self.class_pixels().clamp(min=1).double().rsqrt() * (self.class_pixels() > 0)
            around = rare_class_pixel(label, weight, source)
        return self.weak_view(image, label, source, around)

    def _unlabelled_view(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.unlabelled is not None
        assert self.unlabelled_order is not None
        raw = self.unlabelled[self.unlabelled_order[position]]
        image = decode_image(raw.image, f"{raw.shard}: {raw.key}")
        return self.weak_view(image, None, generator(self.recipe.run.seed, "unlabelled view", position))

    def _label(self, raw: RawSample) -> Tensor:
        assert raw.label is not None
        label = decode_label(raw.label, f"{raw.shard}: {raw.key}")
        known = label[label != self.labelled.index.ignore_index]
        if len(known) and int(known.max()) >= self.num_classes:
            raise DataError(
                f"{raw.shard}: {raw.key}: label value {int(known.max())}, but the model has {self.num_classes} classes "
                "(model.num_classes); raise it, or map the labels when writing the shards"
            )
        return label


class _Fetched(Dataset["Batch | DataError"]):
    """A worker's exception arrives wrapped in its traceback; a returned one arrives as it is."""

    def __init__(self, stream: TrainingStream) -> None:
        self.stream = stream

    def __getitem__(self, number: int) -> Batch | DataError:
        try:
            return self.stream[number]
        except DataError as error:
            return error


def batches(stream: TrainingStream, start: int, stop: int, *, pin_memory: bool = False) -> Generator[Batch, None, None]:
    """Micro-batches ``start`` … ``stop`` - 1 in order, loaded ahead by ``data.workers`` processes.

    Raises:
        DataError: a sample that cannot be used, when its batch is due.
    """
    workers = stream.recipe.data.workers
    loader = DataLoader(
        _Fetched(stream),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=pin_memory,
    )
    for fetched in loader:
        if isinstance(fetched, DataError):
            raise fetched
        yield fetched


def evaluation_samples(root: str, split: str, rank: int, world_size: int) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """This rank's share of a labelled split, each sample once over all ranks: (number, key, image, label).

    image: uint8 (3, H, W); label: uint8 (H, W).
    """
    stream = ShardStream(root, split)
    if not stream.entry.labelled:
        raise DataError(f"{root}: stream {split!r} has no labels to evaluate against")
    for number in range(rank, len(stream), world_size):
        raw = stream[number]
        assert raw.label is not None
        name = f"{raw.shard}: {raw.key}"
        yield number, raw.key, decode_image(raw.image, name), decode_label(raw.label, name)
