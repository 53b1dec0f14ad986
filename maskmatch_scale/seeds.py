"""Random generators that depend on a seed and a purpose, and not on earlier draws.

Every draw of the package comes from a generator made from (seed, purpose, position). So a sample gets the same crop,
colours, box and mask for any number of ranks, workers and restarts, and the only random state of a run is its step.

Decision: docs/decisions/0007-no-files-of-random-state.md.
"""

from __future__ import annotations

import hashlib

import torch

_LOWER = 0xFFFF_FFFF
_STATE_BYTES = 5056
_WORDS = slice(24, 24 + 624 * 8)
"""Where the state of torch's CPU generator has the 624 words of MT19937, of 8 bytes each."""


def derive_seed(seed: int, *what: str | int) -> int:
    """A 63-bit seed for one purpose, for example ``derive_seed(recipe.run.seed, "mask", position)``.

    `torch.manual_seed` takes the lower 32 bits of it on a CPU, and all of them on a GPU; :func:`generator` takes all.
    """
    digest = hashlib.blake2b(repr((seed, *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *what: str | int) -> torch.Generator:
    """A CPU generator for one purpose; see :func:`derive_seed`."""
    return generator_of(derive_seed(seed, *what))


def generator_of(seed: int) -> torch.Generator:
    """A CPU generator that depends on all bits of a seed, 0 ≤ seed < 2⁶⁴.

    torch's own generator, MT19937, takes the lower 32 bits only. So the state that these give is combined with the
    state that the upper bits give, by exclusive or: every number that is drawn is then the exclusive or of those that
    the two would draw. Where the upper bits are 0 the draws are those of `torch.Generator().manual_seed(seed)`.
    """
    made = torch.Generator().manual_seed(seed & _LOWER)
    upper = seed >> 32
    if upper:
        state = made.get_state()
        assert len(state) == _STATE_BYTES, "this torch keeps the state of its generator in another way"
        state.numpy()[_WORDS] ^= torch.Generator().manual_seed(upper).get_state().numpy()[_WORDS]
        made.set_state(state)
    return made


def uniform(source: torch.Generator, low: float, high: float) -> float:
    """One number drawn uniformly from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=source))
