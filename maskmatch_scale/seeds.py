"""Random numbers that depend on what they are for, not on who drew before.

Every draw of the package comes from a generator made from (seed, purpose, position): a sample gets the same crop,
colours, box and mask whatever the number of ranks, workers and restarts, and a run's only random state is its step.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *what: str | int) -> int:
    """A 63-bit seed for one purpose, for example ``derive_seed(recipe.run.seed, "mask", position)``."""
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *what: str | int) -> torch.Generator:
    """A CPU generator for one purpose; see :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *what))


def uniform(source: torch.Generator, low: float, high: float) -> float:
    """One number drawn uniformly from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=source))
