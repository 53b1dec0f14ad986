"""A folder of shards, as a recipe names it: how its files are fetched, its index, and its shards by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from maskmatch_scale.data.faults import DataError, NotShards
from maskmatch_scale.data.images.bands import Channels, choose_channels
from maskmatch_scale.data.remote.address import join
from maskmatch_scale.data.remote.cache_place import default_cache
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.remote.transfer import FetchOptions
from maskmatch_scale.data.shards.finding import find_index, modified
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.redact import is_remote, shown


def fetch_options(data: DataRecipe) -> FetchOptions:
    """The options of a recipe for fetching remote shards."""
    return FetchOptions(
        cache=Path(data.cache_dir) if data.cache_dir else default_cache(),
        limit_bytes=int(data.cache_gb * 1e9),
        timeout_s=data.fetch_timeout_s,
        attempts=data.fetch_attempts,
        allow_pipe=data.allow_pipe,
    )


def load_index(
    root: str,
    data: DataRecipe | None = None,
    *,
    fresh: bool = False,
    key: str = "data.root",
    parts: bool = False,
) -> ShardIndex:
    """Read the index of a shard folder, ours or one that others wrote (:mod:`maskmatch_scale.data.shards.finding`).

    A remote one is fetched once by each process: during a run its shards must stay as they are.

    Its classes are those that `data.remap` makes of the stored ones. Names that the recipe remaps must be classes of
    `data.root`; an index of another folder may lack some.

    Args:
        root: path or address of a folder, or of the index itself.
        data: how it is fetched if it is remote, and which classes are remapped; None = by the defaults.
        fresh: whether a remote one is fetched again, although this process has read it.
        key: of the recipe, whose value the root is, for the message about a root that is no shard folder; empty: the
            root was not given by a recipe.
        parts: whether it may be that of one part of a data set, which several machines write.

    Raises:
        DataError: there is none, it cannot be fetched, it does not parse, it is that of one part, or its classes cannot
            be remapped so.
    """
    data = data or DataRecipe(root=root)
    options = fetch_options(data)
    if is_remote(root):
        if fresh:
            _remote_index.cache_clear()
        index = _remote_index(root, options)
    else:
        try:
            index = _local_index(root, modified(root), options)
        except NotShards as error:
            raise NotShards(f"{key}={error}" if key else str(error)) from None
    if index.part is not None and not parts:
        raise DataError(
            f"{shown(root)}: only part {index.part} of a data set; put all parts together by `maskmatch shards merge "
            "PART… --out DIR`"
        )
    if not data.remap:
        return index
    try:
        return index.remapped(data.remap, strict=root == data.root)
    except ValueError as error:
        raise DataError(f"{shown(root)}: {error}") from None


def channels_of(
    index: ShardIndex, data: DataRecipe, root: str | None = None, names: Sequence[str] | None = None
) -> Channels | None:
    """What the decoder makes of the images of a shard folder, as `data.channels` and `data.value_ranges` say.

    Args:
        index: of the folder.
        data: the section of the recipe.
        root: of the folder, for the message; None: `data.root`.
        names: wanted bands of a folder other than `data.root`, in place of `data.channels`.

    Returns:
        For :func:`maskmatch_scale.data.images.decode.decode_image`; None for plain images, read as RGB.

    Raises:
        DataError: the index lacks a wanted band; names the key, the band and those that there are.
    """
    try:
        if names is None:
            return choose_channels(index.bands, data.channels, data.value_ranges)
        ranges = {name: bounds for name, bounds in data.value_ranges.items() if name in names}
        return choose_channels(index.bands, names, ranges)
    except ValueError as error:
        raise DataError(f"{shown(root or data.root)}: {error}") from None


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
