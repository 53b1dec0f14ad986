"""Files of equal bytes, found without reading all of every file.

Files of equal sizes are compared by their last few kilobytes, which differ between nearly any two compressed images.
Only those that agree there are read in full. Sizes alone are not enough: of ten million photographs nearly all share
their size with another.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.files import sha256
from maskmatch_scale.progress import progress_of

T = TypeVar("T")

_TAIL_BYTES = 4096
_BATCH_CHUNKS = 64
_AT_ONCE = 128
"""Files a thread takes at a time."""


def find_duplicates(paths: Sequence[str], *, threads: int, progress: bool) -> dict[int, int]:
    """Files that have the same bytes as an earlier one.

    Args:
        paths: files, those to be kept rather than others first. Those that cannot be read equal none.
        threads: that read.
        progress: whether to report on stderr.

    Returns:
        For each number of a file that an earlier one equals, the number of the first of them.
    """
    with ThreadPoolExecutor(threads) as pool:
        everything = np.arange(len(paths))
        sizes = _of_all(pool, _size, paths, everything, "sizes", progress)
        same_size = _shared(everything, sizes)
        tails = _of_all(pool, _tail, paths, same_size, "ends", progress)
        # Two files of equal ends but other sizes are read in full and told apart; there are few.
        suspects = _shared(same_size, tails)
        first: dict[str, int] = {}
        equals = {}
        for number, digest in _in_chunks(pool, _sha256, paths, suspects, "contents", progress):
            if digest and (earlier := first.setdefault(digest, number)) != number:
                equals[number] = earlier
    return equals


def _of_all(
    pool: ThreadPoolExecutor,
    function: Callable[[str], int],
    paths: Sequence[str],
    numbers: NDArray[np.int64],
    what: str,
    progress: bool,
) -> NDArray[np.int64]:
    found = (value for _, value in _in_chunks(pool, function, paths, numbers, what, progress))
    return np.fromiter(found, np.int64, len(numbers))


def _in_chunks(
    pool: ThreadPoolExecutor,
    function: Callable[[str], T],
    paths: Sequence[str],
    numbers: NDArray[np.int64],
    what: str,
    progress: bool,
) -> Iterator[tuple[int, T]]:
    """`(number, value)` in order. Few chunks are under way at once: millions of futures would fill the memory."""

    def work(chunk: list[int]) -> list[tuple[int, T]]:
        return [(number, function(paths[number])) for number in chunk]

    chunks = [numbers[start : start + _AT_ONCE].tolist() for start in range(0, len(numbers), _AT_ONCE)]
    name, wanted = f"duplicates by {what}", progress and len(numbers) > 0
    with progress_of(name, len(numbers), unit="files", wanted=wanted, elsewhere="lines if slow") as advance:
        for start in range(0, len(chunks), _BATCH_CHUNKS):
            for found in chain.from_iterable(pool.map(work, chunks[start : start + _BATCH_CHUNKS])):
                advance()
                yield found


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def _tail(path: str) -> int:
    """A hash of the end of a file, at least 0; -1 if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return int.from_bytes(hashlib.blake2b(file.read(), digest_size=8).digest(), "big") >> 1
    except OSError:
        return -1


def _sha256(path: str) -> str:
    """Hex digest of a file; empty if it cannot be read."""
    try:
        return sha256(Path(path))
    except OSError:
        return ""


def _shared(numbers: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers, in their order, whose value occurs more than once; negative values stand for unreadable files."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return numbers[(counts[place] > 1) & (values >= 0)]
