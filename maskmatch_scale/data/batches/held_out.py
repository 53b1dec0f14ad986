"""One pass over a labelled split: every sample once, whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from maskmatch_scale.data.batches.processes import in_processes
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.decode import decode_image, decode_label
from maskmatch_scale.data.order.epoch import Cut
from maskmatch_scale.data.shards.folder import channels_of
from maskmatch_scale.data.shards.reading import RawSample, ShardStream
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.redact import shown

_AHEAD = 2
"""Samples that each process decodes ahead of time."""


@dataclass(frozen=True)
class EvaluationSample:
    """One sample of a held-out split."""

    number: int
    """Its number in the split."""
    key: str
    image: Tensor
    """uint8 (C, H, W)."""
    label: Tensor
    """uint8 (H, W)."""

    def shared(self) -> EvaluationSample:
        """The same sample in shared memory, where the loader's queue would put it.

        The queue does so in a thread of its own, and a failure there would leave the loader waiting for ever.

        Raises:
            DataError: there is too little; says what to do.
        """
        try:
            for tensor in (self.image, self.label):
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise DataError(
                f"{self.key}: /dev/shm has no room for this image of {self.image.nbytes / 1e6:.0f} MB and those "
                f"decoded meanwhile ({error}); give the container more (docker run --shm-size=1g or --ipc=host) or set "
                "data.workers=0"
            ) from None
        return self

    def pin_memory(self) -> EvaluationSample:
        """The same sample, its image in page-locked memory; torch's loader calls this, too."""
        return replace(self, image=self.image.pin_memory())


class _Decoded(Dataset["EvaluationSample | DataError"]):
    """Maps the number of a sample of a labelled stream to the sample."""

    def __init__(self, stream: ShardStream, data: DataRecipe, patience_s: float) -> None:
        self.stream, self.max_pixels, self.patience_s = stream, data.max_image_px, patience_s
        self.channels = channels_of(stream.index, data)

    def __getitem__(self, number: int) -> EvaluationSample | DataError:
        def decode(raw: RawSample) -> EvaluationSample:
            assert raw.label is not None
            image = decode_image(raw.image, raw.name, channels=self.channels, max_pixels=self.max_pixels)
            size = (image.shape[-2], image.shape[-1])
            label = decode_label(raw.label, raw.name, ignore_index=self.stream.index.ignore_index, size=size)
            return EvaluationSample(number, raw.key, image, label)

        try:
            sample = self.stream.load(*self.stream.locate(number), decode, patience_s=self.patience_s)
            return sample if get_worker_info() is None else sample.shared()
        except DataError as error:
            return error  # returned, because torch would add a traceback to the message of one that is raised


def evaluation_samples(
    data: DataRecipe,
    split: str,
    rank: int = 0,
    world_size: int = 1,
    numbers: Sequence[int] | None = None,
    *,
    workers: int = 0,
    pin_memory: bool = False,
    patience_s: float = math.inf,
) -> Generator[EvaluationSample, None, None]:
    """This rank's share of a labelled split of `data.root`, each sample once over all ranks.

    A rank reads consecutive samples, so that it needs only some of the shards. Close the generator if not all samples
    were taken: this ends the processes.

    Args:
        data: the section of the recipe.
        split: name of the stream.
        rank: whose share. If the samples cannot be shared out equally, the first ranks have one more.
        world_size: number of ranks.
        numbers: numbers of the samples to read instead of the rank's share.
        workers: processes that decode the next samples meanwhile; 0 = each is decoded here when it is asked for.
        pin_memory: whether images are in page-locked memory.
        patience_s: how long to wait for a shard of which nothing comes; without it, `data.fetch_attempts` alone ends a
            fetch.

    Raises:
        NotFetched: when it is the turn of a sample whose shard did not come.
        DataError: the split has no labels, or its images lack a channel; or, when it is its turn, a sample cannot be
            used.
    """
    stream = ShardStream(data.root, split, data)
    if not stream.labels:
        raise DataError(f"{shown(data.root)}: stream {split!r} has no labels to evaluate against")
    if numbers is None:
        cut = Cut(len(stream), world_size)
        numbers = range(cut.start(rank), cut.start(rank + 1))
    decoded = _Decoded(stream, data, patience_s)
    workers = min(workers, len(numbers) - 1)  # for a single sample there is nothing to decode meanwhile
    if workers > 0:
        found = in_processes(decoded, numbers, workers, _AHEAD, pin_memory=pin_memory)
    else:
        found = (decoded[number] for number in numbers)
    with closing(found):
        for sample in found:
            if isinstance(sample, DataError):
                raise sample
            yield sample.pin_memory() if pin_memory and not workers > 0 else sample
