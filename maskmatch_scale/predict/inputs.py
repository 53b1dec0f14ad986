"""What the words of a command stand for: image files and shards, here or on other machines."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.bands import Band
from maskmatch_scale.data.remote.address import join
from maskmatch_scale.data.remote.patterns import expand
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.index import INDEX_NAME, ShardIndex
from maskmatch_scale.data.writing.sources.listing import files_below
from maskmatch_scale.data.writing.sources.store_image import EXTENSIONS
from maskmatch_scale.errors import UserError
from maskmatch_scale.predict.naming import parts_of_address
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.redact import PIPE, is_remote, shown

TIFF = (".tif", ".tiff")
"""Endings of files that are read in parts."""
_SHARD, _LIST, _INDEX = ".tar", ".txt", ".json"


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own."""

    location: str
    """Absolute path, or address."""

    @property
    def is_tiff(self) -> bool:
        """Whether its name says that it is a TIFF."""
        return suffix(self.location) in TIFF


@dataclass(frozen=True)
class Shard:
    """A tar of images."""

    location: str
    """Absolute path, or address."""
    samples: int | None = None
    """Number of its samples, as an index says; None: no index lists it."""
    bytes: int | None = None
    """Its size, likewise."""
    sha256: str | None = None
    """Its hex digest, likewise."""
    bands: tuple[Band, ...] | None = None
    """What the pages of its images hold, likewise; empty: plain images."""


Input = ImageFile | Shard


def suffix(location: str) -> str:
    """The ending of the name of a file, in lower case, with its dot; of an address without its query."""
    path = parts_of_address(location)[1] if is_remote(location) else location
    return os.path.splitext(path)[1].lower()  # noqa: PTH122 - the path of an address is none of this machine


def find_inputs(words: Sequence[str], out: Path, data: DataRecipe) -> list[Input]:
    """Find the images and shards that words stand for, each once, in the order of the words.

    Args:
        words: paths and addresses, patterns of them (`*`, `?`, `[…]`, `{a,b}`, `{000..127}`), folders with whatever
            lies below them, shard folders with all their shards, and lists: `.txt` files with a path or an address a
            line.
        out: folder that predictions are written to. What folders and patterns stand for has nothing of it, so that the
            same command can be started again.
        data: how indexes on other machines are fetched.

    Raises:
        UserError: a word matches nothing, there is no image at all, or ``out`` is an input itself.
    """
    found: dict[Input, None] = {}
    real_out = _real(out)
    for word in words:
        for location in expand(word):
            if location != word and not _is_meant(location, word, real_out):
                continue
            if not is_remote(location) and _real(location) == real_out:
                raise UserError(f"--out {out}: it is an input itself; name another folder for the predictions")
            found.update(dict.fromkeys(_inputs_of(location, out, data)))
    if not found:
        raise UserError(
            f"{', '.join(map(shown, words))}: no image; files {', '.join(EXTENSIONS)} and shards {_SHARD} are read"
        )
    return list(found)


def _is_meant(location: str, pattern: str, out: Path) -> bool:
    """Whether what a pattern has matched is an input: nothing in ``out``, and no list or index that it matched only
    because they lie beside images, such as labels of other programs.
    """
    if is_remote(location):
        return True
    ending = suffix(location)
    if ending in (_LIST, _INDEX) and glob.has_magic(pattern) and suffix(pattern) != ending:
        return False
    real = _real(location)
    return out not in (real, *real.parents)


def _inputs_of(location: str, out: Path, data: DataRecipe) -> Iterator[Input]:
    ending = suffix(location)
    if location.startswith(PIPE) or ending == _SHARD:
        yield _shard_alone(location)
    elif ending == _INDEX or (not is_remote(location) and (Path(location) / INDEX_NAME).is_file()):
        yield from _shards_of(location, data)
    elif is_remote(location):
        yield ImageFile(location)
    elif Path(location).is_dir():
        folder = Path(location)
        for file in files_below(folder, leave_out=(os.path.relpath(out.resolve(), folder.resolve()),)):
            if suffix(file) in EXTENSIONS:
                yield ImageFile(_absolute(str(folder / file)))
            elif suffix(file) == _SHARD:
                yield _shard_alone(str(folder / file))
    elif ending == _LIST:
        yield from _listed(Path(location))
    else:
        yield ImageFile(_absolute(location))


def _shard_alone(location: str) -> Shard:
    """A shard that was named without its index. If an index with bands lies beside it, its pages have these names."""
    location = _absolute(location)
    if is_remote(location):
        return Shard(location)
    index = Path(location).parent / INDEX_NAME
    if not index.is_file():
        return Shard(location)
    listed, bands = _bands_beside(index, index.stat().st_mtime_ns)
    return Shard(location, bands=bands) if location in listed else Shard(location)


@lru_cache(maxsize=64)
def _bands_beside(path: Path, changed_ns: int) -> tuple[frozenset[str], tuple[Band, ...]]:
    """The shards that an index lists, and their bands; no shards if it names no bands, or cannot be read.

    Args:
        path: of the index.
        changed_ns: when it was written, so that a new one is read again.
    """
    del changed_ns
    try:
        index = ShardIndex.load(path)
    except DataError:
        return frozenset(), ()
    entries = (entry for stream in index.streams.values() for entry in stream.shards) if index.bands else ()
    return frozenset(_absolute(join(str(path.parent), entry.file)) for entry in entries), index.bands


def _shards_of(root: str, data: DataRecipe) -> Iterator[Shard]:
    """The shards of all streams of a shard folder, or of its index."""
    index = load_index(root, data)
    for stream in index.streams.values():
        for entry in stream.shards:
            location = join(root, entry.file)
            yield Shard(_absolute(location), entry.samples, entry.bytes, entry.sha256, index.bands)


def _listed(file: Path) -> Iterator[Input]:
    """What a list names: a path, relative to the folder of the list, or an address a line; `#` begins a comment."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # some editors begin files with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: this list cannot be read ({error}); write a path or an address a line") from None
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            location = line if is_remote(line) else _absolute(str(file.parent / line))
            yield _shard_alone(location) if suffix(location) == _SHARD else ImageFile(location)


def _absolute(location: str) -> str:
    """An address as it is, or an absolute path without `..`: links stay as they are, except those before a `..`."""
    if is_remote(location):
        return location
    parts = Path(location).parts
    behind = max((number for number, part in enumerate(parts, start=1) if part == ".."), default=0)
    return str(_real(Path(*parts[:behind])).joinpath(*parts[behind:]))


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a link to itself


@dataclass(frozen=True)
class Share:
    """What one rank does of an input."""

    input: Input
    first: int = 0
    """Of a shard: its first sample."""
    step: int = 1
    """Of a shard: every so many samples, from the first one on, are this rank's."""


def deal(inputs: Iterable[Input], rank: int, world_size: int) -> list[Share]:
    """The share of a rank, so that all ranks together have each image once; nothing is sent between them.

    Files are dealt one by one, and so are the samples of shards of this machine. A shard that must be fetched belongs
    to one rank whole.

    Args:
        inputs: all of them, the same on all ranks.
        rank: 0 ≤ rank < ``world_size``.
        world_size: number of ranks.
    """
    shares, whole = [], 0
    for number, each in enumerate(inputs):
        if isinstance(each, Shard) and not is_remote(each.location):
            # Another rank begins each shard: shards of one sample would all be rank 0's.
            shares.append(Share(each, (rank + number) % world_size, world_size))
        else:
            if whole % world_size == rank:
                shares.append(Share(each))
            whole += 1
    return shares
