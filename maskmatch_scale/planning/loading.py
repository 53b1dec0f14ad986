"""What the loader of a host has to read and decode, and how much the data that a recipe names have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskmatch_scale.data.batches.cache_room import cache_lines
from maskmatch_scale.data.batches.sources import Side
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.planning.efficiency import DECODED_A_CORE, DECODED_BYTES
from maskmatch_scale.planning.setting import Cluster
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe.learning import uses_unlabelled


@dataclass(frozen=True)
class Counts:
    """Samples that a run uses; None: nobody knows, or the data cannot be read here."""

    labelled: int | None = None
    unlabelled: int | None = None
    bytes_a_sample: float | None = None
    """Mean over the shards of the unlabelled sources, or of the labelled ones if there are none."""
    notes: tuple[str, ...] = ()
    """About the cache of fetched shards, and about what could not be opened."""


@dataclass(frozen=True)
class Loading:
    """What a host reads, at the step time that is planned."""

    images_per_s: float
    """Of a host: distinct images, labelled and unlabelled."""
    bytes_per_s: float
    """Of their shards, from disk or from a store."""
    cores: float
    """Busy decoding, on each host."""
    bytes_a_sample: float
    bytes_known: bool
    """Whether the shards say so; else it is that of the loader's benchmark."""

    def fastest_step_s(self, images: int, cores: int, workers: int, ranks: int) -> float:
        """Seconds for the images of a step, if nothing else were slow.

        Args:
            images: of a step, on one host.
            cores: of the host.
            workers: loader processes of each rank; 0: one, the training process itself.
            ranks: of the host.
        """
        busy = min(cores, max(1, workers) * ranks)
        return images * _core_seconds(self.bytes_a_sample) / busy


def count(subject: Subject, index: ShardIndex | None, cluster: Cluster) -> Counts:
    """Count the samples that the recipe chooses of its sources.

    Args:
        subject: its recipe is read.
        index: of `data.root`; None: it cannot be read.
        cluster: its ranks share the samples, and those of a host a cache.

    Raises:
        UserError: the data can be read, and there are not as many labelled samples as the recipe wants.
    """
    if index is None:
        return Counts()
    recipe = subject.recipe
    try:
        batches = TrainingBatches(
            recipe,
            subject.student.num_classes,
            0,
            cluster.ranks,
            unlabelled=uses_unlabelled(recipe.method),
            index=index,
        )
    except (DataError, OSError) as error:
        return Counts(notes=(f"sources cannot be opened here: {error}",))
    sides = [side for side in (batches.unlabelled, batches.labelled) if side is not None]
    sizes = [size for side in sides if (size := _bytes_a_sample(side)) is not None]
    return Counts(
        batches.labelled_samples if batches.labelled is not None else 0,
        batches.unlabelled_samples,
        sizes[0] if sizes else None,
        tuple(cache_lines(batches, cluster.ranks_per_host)),
    )


def loading(images: int, step_s: float, counts: Counts) -> Loading:
    """What a host has to load.

    Args:
        images: of a step, on one host.
        step_s: seconds of a step.
        counts: of the data.
    """
    size = counts.bytes_a_sample or DECODED_BYTES
    rate = images / step_s
    return Loading(rate, rate * size, rate * _core_seconds(size), size, counts.bytes_a_sample is not None)


def _core_seconds(bytes_a_sample: float) -> float:
    """To read and decode a sample and make its weak view: in proportion to its bytes, but never below the benchmark's.

    Smaller images are decoded faster, but the crop has to be made all the same.
    """
    return max(1.0, bytes_a_sample / DECODED_BYTES) / DECODED_A_CORE


def _bytes_a_sample(side: Side) -> float | None:
    found = []
    for source in side.indexed:
        shards = source.stream.shards
        known = shards.bytes > 0
        if known.any():
            found.append(float(np.sum(shards.bytes[known]) / np.sum(shards.samples[known])))
    return float(np.mean(found)) if found else None
