"""A folder of shards, as a recipe names it: how its files are fetched, its index, and its shards by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from maskmatch_scale.data.faults import NotShards
from maskmatch_scale.data.remote.address import join
from maskmatch_scale.data.remote.cache_place import default_cache
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards.finding import find_index, modified
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.redact import is_remote


def fetch_options(data: DataRecipe) -> FetchOptions:
    """The options of a recipe for fetching remote shards."""
    return FetchOptions(
        cache=Path(data.cache_dir) if data.cache_dir else default_cache(),
        limit_bytes=int(data.cache_gb * 1e9),
        timeout_s=data.fetch_timeout_s,
        attempts=data.fetch_attempts,
        allow_pipe=data.allow_pipe,
    )


def load_index(root: str, data: DataRecipe | None = None, *, fresh: bool = False, key: str = "data.root") -> ShardIndex:
    """Read the index of a shard folder, ours or one that others wrote (:mod:`maskmatch_scale.data.shards.finding`).

    A remote one is fetched once by each process: during a run its shards must stay as they are.

    Args:
        root: path or address of a folder, or of the index itself.
        data: how it is fetched if it is remote; None = by the defaults.
        fresh: whether a remote one is fetched again, although this process has read it.
        key: of the recipe, whose value the root is, for the message about a root that is no shard folder; empty: the
            root was not given by a recipe.

    Raises:
        DataError: there is none, it cannot be fetched, or it does not parse.
    """
    options = fetch_options(data or DataRecipe(root=root))
    if not is_remote(root):
        try:
            return _local_index(root, modified(root), options)
        except NotShards as error:
            raise NotShards(f"{key}={error}" if key else str(error)) from None
    if fresh:
        _remote_index.cache_clear()
    return _remote_index(root, options)


@lru_cache(maxsize=8)
def _remote_index(root: str, options: FetchOptions) -> ShardIndex:
    return find_index(root, options)


@dataclass(frozen=True)
class ShardOpener:
    """Opens shards of a folder by their names in its index; picklable.

    Args:
        root: path or address of the folder or of its index.
        data: how remote shards are fetched; None = by the defaults.
    """

    root: str
    data: DataRecipe | None = None

    def __call__(self, file: str) -> BinaryIO:
        """Open the shard that the index calls ``file``.

        Raises:
            OSError: it is local and does not exist.
            DataError: it is remote and cannot be fetched.
        """
        location = join(self.root, file)
        if is_remote(location):
            return ShardCache(fetch_options(self.data or DataRecipe(root=self.root))).open(location)
        if not Path(location).is_file():  # opening a named pipe would wait for ever
            raise FileNotFoundError(f"{location}: the index names this shard but the file is not there")
        return Path(location).open("rb")


@lru_cache(maxsize=2)
def _local_index(root: str, modified: tuple[int, int], options: FetchOptions) -> ShardIndex:
    """Cached, because each evaluation asks for the index, and reading one of a million shards takes seconds."""
    return find_index(root, options)
