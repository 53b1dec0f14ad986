"""How many pixels of each class the labelled samples of a run have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.order.epoch import Cut
from maskmatch_scale.data.order.source import WeightedSource
from maskmatch_scale.data.shards.label_pixels import known_pixels, pixel_warnings, sum_of
from maskmatch_scale.data.shards.reading import RawSample
from maskmatch_scale.data.shards.second_labels import LabelsElsewhere


class ClassPixels:
    """Pixels of each class in the used samples of labelled sources. They are counted once, at the first use.

    Args:
        sources: the labelled sources.
        num_classes: classes of the model.
        label_map: decodes a sample's label map to uint8 (H, W), or raises BadSample.
    """

    def __init__(
        self, sources: Sequence[WeightedSource], num_classes: int, label_map: Callable[[RawSample], Tensor]
    ) -> None:
        self._sources, self._num_classes, self._label_map = sources, num_classes, label_map
        self._total: Tensor | None = None

    def total(self) -> Tensor:
        """int64 (classes,). Reads all label maps if they were not counted before.

        Raises:
            BadSample: a label map cannot be used, and its source skips none.
        """
        if self._total is None:
            self._total = self._count(0, 1)
        return self._total

    def count_on_all_ranks(self, rank: int, world_size: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Count now, each rank a share of the samples. All ranks must call it together.

        Args:
            rank: this one.
            world_size: number of ranks.
            sum_over_ranks: sums an int64 (classes,) over all ranks.
        """
        self._total = sum_over_ranks(self._count(rank, world_size))

    def warnings(self, classes: Sequence[str]) -> list[str]:
        """Classes that never occur, and mostly ignored pixels, a line each; of the index, or of what was counted.

        No label map is read for it. Where neither says how many pixels there are, nothing is warned of.

        Args:
            classes: names.
        """
        said = sum_of(_of_index(source) for source in self._sources)
        counted = (said or ())[:-1] if self._total is None else self._total.tolist()
        # Of some samples of a source it is not known how many pixels are ignored, only that no others occur.
        is_whole = all(source.numbers is None for source in self._sources)
        ignored = said[-1] if said is not None and is_whole else 0
        return pixel_warnings("labelled samples", [*counted, ignored], classes) if counted else []

    def _count(self, rank: int, world_size: int) -> Tensor:
        total = torch.zeros(self._num_classes, dtype=torch.int64)
        for source in self._sources:
            numbers = range(len(source.stream)) if source.numbers is None else source.numbers.tolist()
            cut = Cut(len(numbers), world_size)
            for number in numbers[cut.start(rank) : cut.start(rank + 1)]:
                try:
                    label = source.stream.load(*source.stream.locate(number), self._label_map)
                except BadSample:
                    if not source.skip:
                        raise
                    continue
                total += torch.bincount(label.flatten(), minlength=256)[: self._num_classes]
        return total


def _of_index(source: WeightedSource) -> tuple[int, ...] | None:
    """Pixels of each class in all samples of a source, and last ignored ones, by its index; None = not known."""
    if isinstance(source.stream, LabelsElsewhere):
        return None
    return known_pixels(source.stream.index).get(source.stream.name)
