"""What every loader is asked to do, and the limits that all of them share."""

from __future__ import annotations

from dataclasses import dataclass

PREFETCH = 2
"""Batches that a loader process makes ahead, in every variant, as in `data/batches/loading.py` of the package."""

SAMPLES_PER_SHARD = 250


@dataclass(frozen=True)
class Task:
    """What every loader has to do."""

    root: str
    """Shard folder or its URL."""
    shards: tuple[str, ...]
    """Paths or URLs of the shards, for loaders that take a list."""
    peers: str
    """Folder with the same JPEGs in litdata's and mosaicml-streaming's formats."""
    cache: str
    """Cache folder of the package's own loader."""
    batch: int
    """Samples of a batch."""
    crop_px: int
    """Side of a view, px."""
    window: int
    """Samples that are shuffled with each other."""
    workers: int
    """Loader processes; 0: the consumer's process loads."""
    cold: bool = False
    """Whether the cache is emptied before."""
