"""The metadata of samples, their `.json` members, by which a source's `where` chooses among them.

A member is read if it is a plain file of at most a megabyte; what is in it may come from anybody.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.shards.members import TarMembers, read_at
from maskmatch_scale.data.shards.tar import GroupedMembers
from maskmatch_scale.recipe.where import Where, value_of

METADATA_EXTENSION = "json"
MAX_METADATA_BYTES = 1 << 20
_MOST_NAMES = 200
"""Names of fields that are remembered for a message."""
_SHOWN_NAMES = 20
_SHOWN_CHARACTERS = 60
"""Of a name."""


def read_metadata(file: BinaryIO, shard: str) -> Iterator[bytes | None]:
    """The `.json` member of each sample of a tar, in the places that :func:`read_table` gives them; None: it has none.

    Args:
        file: the tar.
        shard: its name in messages.

    Raises:
        BadSample: ``shard_unreadable``: the file cannot be read, or is no tar.
    """
    members = TarMembers(file, shard)
    samples = GroupedMembers(labelled=False, kept=METADATA_EXTENSION)
    try:
        for name, flag, offset, size in members:
            samples.add(name, flag, offset, size, members.file_size)
        samples.end(bool(members.damage))
        for offset, size in samples.kept_spans:
            found = read_at(file, offset, size) if offset >= 0 and size <= MAX_METADATA_BYTES else None
            yield found if found is None or len(found) == size else None
    except OSError as error:
        raise BadSample("shard_unreadable", f"{shard}: cannot be read ({error}); try again") from None


class MetadataFilter:
    """Says of each sample whether a condition chooses it, and counts.

    Args:
        where: the condition.

    Attributes:
        samples: how many it was asked for.
        chosen: of these.
        undecided: of these, had a `.json`, but not the fields that the condition needs, or these had other types.
        without: of these, had no `.json` member that is a JSON object.
    """

    def __init__(self, where: Where) -> None:
        self.where = where
        self.samples = self.chosen = self.undecided = self.without = 0
        self.unseen = set(where.fields)
        """Fields of the condition that no sample has had."""
        self.names: set[str] = set()
        """Names of fields that samples have had, some of them."""

    def __call__(self, content: bytes | None) -> bool:
        """Whether the sample with this `.json` member is chosen."""
        self.samples += 1
        metadata = _parsed(content)
        if metadata is None:
            self.without += 1
            return False
        if self.unseen:
            self._look(metadata)
        chosen = self.where(metadata)
        self.chosen += chosen is True
        self.undecided += chosen is None
        return chosen is True

    def _look(self, metadata: dict[str, Any]) -> None:
        self.unseen = {path for path in self.unseen if not _has(metadata, path)}
        self._remember(_names(metadata))

    def _remember(self, names: Iterable[str]) -> None:
        for name in names:
            if len(self.names) >= _MOST_NAMES:
                return
            self.names.add(name)

    def as_json(self) -> dict[str, Any]:
        """Its counts, as :meth:`restore` takes them."""
        counts = {"samples": self.samples, "chosen": self.chosen, "undecided": self.undecided, "without": self.without}
        return {**counts, "unseen": sorted(self.unseen), "names": sorted(self.names)}

    def restore(self, counts: dict[str, Any]) -> None:
        """Go on with the counts of one that had this condition."""
        self.samples, self.chosen = counts["samples"], counts["chosen"]
        self.undecided, self.without = counts["undecided"], counts["without"]
        self.unseen, self.names = set(map(tuple, counts["unseen"])), set(counts["names"])

    def add(self, other: MetadataFilter) -> None:
        """Count also what another one with this condition has counted."""
        self.samples += other.samples
        self.chosen += other.chosen
        self.undecided += other.undecided
        self.without += other.without
        self.unseen &= other.unseen
        self._remember(sorted(other.names))

    def fault(self) -> str | None:
        """Why it is useless for the samples that it was asked for, and what to do; None: it is not."""
        where, asked = f"where {self.where.text!r}", f"none of {self.samples} samples"
        if self.without == self.samples:
            return f"{where}: {asked} has a .json member with metadata; leave the filter out"
        if self.unseen:
            name = ".".join(min(self.unseen))
            names = [_shown(name) for name in sorted(self.names)]
            more = ", …" if len(names) > _SHOWN_NAMES else ""
            return f"{where}: {asked} has a field {name!r}; there are {', '.join(names[:_SHOWN_NAMES])}{more}"
        if not self.chosen:
            undecided = f" ({self.undecided} of them lack a field, or have it with another type)"
            return f"{where}: {asked} is like that{undecided if self.undecided else ''}; choose another filter"
        return None


def _has(metadata: dict[str, Any], path: tuple[str, ...]) -> bool:
    """Whether there is such a field; it may be null."""
    inside = value_of(metadata, path[:-1]) if len(path) > 1 else metadata
    return isinstance(inside, dict) and path[-1] in inside


def _names(metadata: dict[str, Any]) -> Iterator[str]:
    """The names of its fields, and of those of objects in it."""
    for name, value in metadata.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in value)


def _shown(name: str) -> str:
    """A name for a message in one line, whatever its characters and length are."""
    name = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]} …"
    return name if name.isprintable() else repr(name)


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    if content is None:
        return None
    try:
        metadata = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None
