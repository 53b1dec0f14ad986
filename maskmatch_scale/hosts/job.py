"""What a host finds of a recipe's job: the data, the place for the run, room on its disks."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote.address import join
from maskmatch_scale.data.remote.fetch import has_ranges, read_range
from maskmatch_scale.data.remote.patterns import expand
from maskmatch_scale.data.remote.transfer import NoRanges, TransferError
from maskmatch_scale.data.shards.folder import fetch_options, load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.engine.precision import choose_precision
from maskmatch_scale.errors import UserError
from maskmatch_scale.hosts.facts import free_gib
from maskmatch_scale.recipe import DataRecipe, Recipe
from maskmatch_scale.redact import is_remote, redacted, shown
from maskmatch_scale.timeouts import call_within

_TOKEN_S = 3.0
"""How long a file may take until another host sees it, on a network disk that is slow to tell."""
_STORE_S = 10.0
"""How long a store may take to answer."""
_TRIES, _PAUSE_S = 3, 0.5


@dataclass(frozen=True)
class JobFacts:
    """What one host finds of a job. All values are of JSON."""

    precision: str
    """Of the arithmetic: what `engine.precision=auto` means on its GPU."""
    data: dict[str, str]
    """Digest of each index by its address: of the shards that it lists, by their checksums."""
    faults: tuple[str, ...]
    """Why no run can start on this host, a line each: an index that cannot be read, a precision that it lacks."""
    unreached: tuple[str, ...]
    """First shards of sources that cannot be read from this host, a line each. A run may be made to skip them."""
    sees_run_dir: bool | None
    """Whether it sees what rank 0 has just written in the place of `run.dir`; None: nothing could be written."""
    run_free_gib: float | None
    """Free on the disk of `run.dir`."""
    cache: str
    """Folder in which it keeps fetched shards and tables."""
    cache_free_gib: float | None

    @classmethod
    def here(cls, recipe: Recipe, token: str) -> JobFacts:
        """What this host finds.

        Args:
            recipe: of the job.
            token: path of the file that rank 0 has written (:func:`token_written`); empty: it has written none.
        """
        digests, faults, unreached = data_facts(recipe.data)
        try:
            precision: str = choose_precision(recipe, batchnorm=False)[0]
        except UserError as error:
            precision, faults = recipe.engine.precision, (*faults, str(error))
        cache = fetch_options(recipe.data).cache
        run_free, cache_free = (free_gib(path) for path in (Path(recipe.run.dir).absolute(), cache))
        seen = sees(Path(token)) if token else None
        return cls(precision, digests, faults, unreached, seen, run_free, str(cache), cache_free)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> JobFacts:
        """Read what :meth:`values` gave."""
        return cls(**values | {name: tuple(values[name]) for name in ("faults", "unreached")})

    def values(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)


def data_facts(data: DataRecipe) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Look at the data of a recipe from this host.

    Returns:
        Digests of its indexes by their addresses; lines on indexes and patterns that stand for nothing; lines on first
        shards that cannot be read.
    """
    digests, faults, unreached = {}, [], []
    for root in dict.fromkeys((data.root, *(source.root for source in _sources(data) if source.root is not None))):
        try:
            index = load_index(root, data)
        except UserError as error:
            faults.append(str(error))
            continue
        digests[shown(root)] = _digest(index)
        for stream in index.streams.values():
            if len(stream.shards):
                unreached += _fault(join(root, stream.shards[0].file), data)
    for source in _sources(data):
        pattern = source.shards if source.root is None else None
        # A pattern with * would be listed by the store, which may take minutes.
        if pattern is not None and not (is_remote(pattern) and "*" in pattern):
            try:
                unreached += _fault(expand(pattern)[0], data)
            except DataError as error:
                faults.append(str(error))
    return digests, tuple(faults), tuple(dict.fromkeys(unreached))


def _sources(data: DataRecipe) -> Iterator[Any]:
    yield from data.labelled
    yield from data.unlabelled


def _digest(index: ShardIndex) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, stream in sorted(index.streams.items()):
        digest.update(f"{name} {stream.labelled} {len(stream.shards)}\n".encode())
        digest.update(np.ascontiguousarray(stream.shards.samples, dtype="<i8").tobytes())
        digest.update(stream.shards.identities().tobytes())
    return digest.hexdigest()


def _fault(shard: str, data: DataRecipe) -> list[str]:
    """What keeps this host from reading a shard, in at most one line; of a store its first byte is asked for."""
    if not is_remote(shard):
        return [] if Path(shard).is_file() else [f"{shard}: no such file"]
    if not has_ranges(shard):
        return []
    timeout_s = min(data.fetch_timeout_s, _STORE_S)
    fault = ""
    for attempt in range(min(data.fetch_attempts, _TRIES)):
        time.sleep(attempt * _PAUSE_S)
        try:
            call_within(lambda: read_range(shard, 0, 1, None, None, timeout_s), 2 * timeout_s, name="store-check")
        except NoRanges:
            return []
        except (TransferError, UserError, TimeoutError) as error:
            fault = f"{shown(shard)}: {redacted(str(error))}"
            if not isinstance(error, TransferError) or error.final:
                break
        else:
            return []
    return [fault]


@contextmanager
def token_written(run: Path) -> Generator[str, None, None]:
    """Write a file in the place of a run directory while the body runs, for other hosts to see.

    It lies in the run directory, or while there is none in the nearest folder above it that exists: a run that is
    refused leaves nothing behind.

    Args:
        run: `run.dir`.

    Yields:
        The absolute path of the file; empty where none can be written, which is said when the directory is made.
    """
    place = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.is_dir())
    token = place / f".maskmatch-hosts-{secrets.token_hex(6)}"
    try:
        token.touch(exist_ok=False)
    except OSError:
        yield ""
        return
    try:
        yield str(token)
    finally:
        with suppress(OSError):
            token.unlink()


def sees(token: Path) -> bool:
    """Whether this host sees a file that another has just written; of a network disk it may take a moment."""
    until = time.monotonic() + _TOKEN_S
    while True:
        with suppress(OSError):
            if token.exists():
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
