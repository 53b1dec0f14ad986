"""One pass over a labelled split: every sample once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.decode import decode_image, decode_label
from maskmatch_scale.data.order.epoch import Cut
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.recipe import DataRecipe


@dataclass(frozen=True)
class EvaluationSample:
    """One sample of a held-out split."""

    number: int
    """Its number in the split."""
    key: str
    image: Tensor
    """uint8 (3, H, W)."""
    label: Tensor
    """uint8 (H, W)."""


def evaluation_samples(
    data: DataRecipe, split: str, rank: int = 0, world_size: int = 1, numbers: Iterable[int] | None = None
) -> Iterator[EvaluationSample]:
    """This rank's share of a labelled split of `data.root`, each sample once over all ranks.

    A rank reads consecutive samples, so that it needs only some of the shards.

    Args:
        data: the section of the recipe.
        split: name of the stream.
        rank: whose share. If the samples cannot be shared out equally, the first ranks have one more.
        world_size: number of ranks.
        numbers: numbers of the samples to read instead of the rank's share.

    Raises:
        DataError: the split has no labels, or a sample cannot be used.
    """
    stream = ShardStream(data.root, split, data)
    if not stream.labels:
        raise DataError(f"{data.root}: stream {split!r} has no labels to evaluate against")
    if numbers is None:
        cut = Cut(len(stream), world_size)
        numbers = range(cut.start(rank), cut.start(rank + 1))
    for number in numbers:
        raw = stream[number]
        assert raw.label is not None
        image = decode_image(raw.image, raw.name, max_pixels=data.max_image_px)
        size = (image.shape[-2], image.shape[-1])
        label = decode_label(raw.label, raw.name, ignore_index=stream.index.ignore_index, size=size)
        yield EvaluationSample(number, raw.key, image, label)
