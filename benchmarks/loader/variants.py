"""The loaders that are compared. Each reads the same JPEGs and makes the same views of them, batch by batch.

What a loader needs is imported only when it is used: litdata and mosaicml-streaming run in an environment that has
neither webdataset nor the rest of the package's dependencies.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.loader.task import PREFETCH, Task
from maskmatch_scale.data.batches.augment import WeakView
from maskmatch_scale.data.images.decode import decode_image
from maskmatch_scale.seeds import generator


@lru_cache(maxsize=8)
def _view(crop_px: int) -> WeakView:
    return WeakView((crop_px, crop_px), (0.5, 2.0), 0.5, 255)


def prepare(data: bytes, crop_px: int, *what: str | int) -> tuple[Tensor, Tensor]:
    """The weak view of one JPEG and the mask of its valid pixels, by the package's own decoder and augmentation.

    It is decoded without the copy to planes: the view cuts a piece out and is the same either way.
    """
    image = decode_image(data, "sample", contiguous=False)
    view, _, valid = _view(crop_px)(image, None, generator(0, "benchmark", *what))
    return view, valid


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Views and their valid pixels, each one tensor."""
    return torch.stack([sample[0] for sample in samples]), torch.stack([sample[1] for sample in samples])


@lru_cache(maxsize=2)
def _in_memory(shards: tuple[str, ...]) -> list[bytes]:
    """All JPEGs of the shards, in an order drawn once."""
    found = [data for shard in shards for _, data in read_shard(shard)]
    random.Random(0).shuffle(found)
    return found


def read_shard(path: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every member."""
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            yield member.name, file.read()


def bare(task: Task) -> Iterator[Any]:
    """JPEGs in memory, decoded and augmented and nothing else.

    With ``workers``, so many processes do it at the same time, as in a loader, but hand nothing over. Cores that are
    busy at the same time are slower than one alone, and no loader can change that.
    """
    if task.workers == 0:
        yield from _bare(task, 0)
        return
    fork = multiprocessing.get_context("fork")
    _in_memory(task.shards)
    made = fork.Semaphore(0)
    wanted = fork.Semaphore(PREFETCH * task.workers)
    processes = [fork.Process(target=_make, args=(task, n, made, wanted), daemon=True) for n in range(task.workers)]
    for process in processes:
        process.start()
    try:
        while True:
            made.acquire()
            wanted.release()
            yield None
    finally:
        for process in processes:
            process.kill()
            process.join()


def _make(task: Task, first: int, made: Any, wanted: Any) -> None:
    torch.set_num_threads(1)
    for _ in _bare(task, first * 1000):
        wanted.acquire()
        made.release()


def _bare(task: Task, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    samples = _in_memory(task.shards)
    while True:
        ready = []
        for _ in range(task.batch):
            ready.append(prepare(samples[number % len(samples)], task.crop_px, number))
            number += 1
        yield collate(ready)


def ours(task: Task) -> Iterator[Any]:
    """The package's training batches, unlabelled images alone."""
    from benchmarks.loader.stream import make_batches
    from maskmatch_scale.data.batches.loading import load_batches

    if task.cold:
        shutil.rmtree(task.cache, ignore_errors=True)
    return load_batches(make_batches(task), 0, 1 << 30)


def sequential(task: Task) -> Iterator[Any]:
    """The same, from shards without an index, which are read in sequence."""
    from benchmarks.loader.stream import make_batches
    from maskmatch_scale.data.batches.loading import load_batches

    return load_batches(make_batches(task, sequential=True), 0, 1 << 30)


def _keyed(sample: tuple[str, bytes], crop_px: int) -> tuple[Tensor, Tensor]:
    return prepare(sample[1], crop_px, sample[0])


def webdataset(task: Task) -> Iterable[Any]:
    """Plain webdataset: shards drawn with replacement without end, a shuffle buffer as large as our window."""
    import webdataset as wds

    pipeline = (
        wds.WebDataset(list(task.shards), resampled=True, shardshuffle=False, seed=0)
        .shuffle(task.window)
        .to_tuple("__key__", "jpg")
        .map(partial(_keyed, crop_px=task.crop_px))
        .batched(task.batch, collation_fn=collate)
    )
    if not task.workers:
        return pipeline  # type: ignore[no-any-return]
    loader: Iterable[Any] = wds.WebLoader(pipeline, batch_size=None, num_workers=task.workers, prefetch_factor=PREFETCH)
    return loader


def _loaded(loader: Callable[..., Iterable[Any]], dataset: Any, task: Task) -> Iterable[Any]:
    return loader(
        dataset,
        batch_size=task.batch,
        num_workers=task.workers,
        prefetch_factor=PREFETCH if task.workers else None,
        collate_fn=collate,
    )


def litdata(task: Task) -> Iterable[Any]:
    """Litdata's StreamingDataset and StreamingDataLoader over its own chunks of raw bytes."""
    import litdata

    class Views(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
            number, data = super().__getitem__(index)
            return prepare(bytes(data), task.crop_px, int(number))

    dataset = Views(str(Path(task.peers) / "litdata"), shuffle=True, seed=0)
    return _loaded(litdata.StreamingDataLoader, dataset, task)


@lru_cache(maxsize=2)
def _mosaic_dataset(folder: str, batch: int, crop_px: int) -> Any:
    from streaming import StreamingDataset

    class Views(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
            sample = super().__getitem__(at)
            return prepare(sample["image"], crop_px, int(sample["number"]))

    return Views(local=folder, shuffle=True, shuffle_seed=0, batch_size=batch)


def streaming(task: Task) -> Iterable[Any]:
    """mosaicml-streaming's StreamingDataset in torch's DataLoader over its own shards of raw bytes."""
    # It holds shared memory under a name made from its folder, so one dataset serves all rounds.
    return _loaded(DataLoader, _mosaic_dataset(str(Path(task.peers) / "mds"), task.batch, task.crop_px), task)


VARIANTS: dict[str, Callable[[Task], Iterable[Any]]] = {
    "bare": bare,
    "ours": ours,
    "sequential": sequential,
    "webdataset": webdataset,
    "litdata": litdata,
    "streaming": streaming,
}


def write_peer(name: str, shards: Sequence[str], folder: str) -> None:
    """The same JPEGs, raw, in a peer's own format: litdata's chunks of 250 samples, or MDS shards of about as many."""
    samples = [data for shard in shards for _, data in read_shard(shard)]
    per_shard = len(list(read_shard(shards[0])))
    if name == "litdata":
        from litdata.streaming.writer import BinaryWriter

        out = Path(folder) / "litdata"
        out.mkdir(parents=True)
        writer = BinaryWriter(str(out), chunk_size=per_shard)
        for number, data in enumerate(samples):
            writer[number] = (number, data)
        writer.done()
        writer.merge(1)
    else:
        from streaming import MDSWriter

        limit = sum(map(len, samples)) * per_shard // len(samples)
        columns = {"number": "int", "image": "bytes"}
        with MDSWriter(out=str(Path(folder) / "mds"), columns=columns, size_limit=limit) as mds:
            for number, data in enumerate(samples):
                mds.write({"number": number, "image": data})
