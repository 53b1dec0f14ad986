"""Random generators that depend on a seed and a purpose, and not on earlier draws.

Every draw of the package comes from a generator made from (seed, purpose, position). So a sample gets the same crop,
colours, box and mask for any number of ranks, workers and restarts, and the only random state of a run is its step.

Decision: docs/decisions/0007-no-files-of-random-state.md.
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
