"""What surveys have found of shards: one line a shard, beside the index that they write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.tools.listing import Listed, entries_of
from maskmatch_scale.files import append_lines, write_whole
from maskmatch_scale.redact import has_secret, is_remote

_NAME = ".survey.jsonl"
_PRIVATE = 0o600
_OPTIONAL = ("bytes", "sha256", "etag")

Entry = dict[str, Any]
"""`identity`, `location`, `samples`, and of `bytes`, `sha256` and `etag` what is known."""


def identity(location: str, labelled: bool) -> str:
    """A shard's location and, if it is local, its size and time: a shard that changed is looked at again.

    Raises:
        DataError: it is local and not there.
    """
    text = f"{location} {labelled}"
    if not is_remote(location):
        try:
            status = Path(location).stat()
        except OSError as error:
            raise DataError(f"{location}: {error.strerror}") from None
        text += f" {status.st_size} {status.st_mtime_ns}"
    return text


def entry_of(shard: Listed, labelled: bool) -> Entry:
    """The entry of a shard whose samples are known."""
    known = {name: value for name in _OPTIONAL if (value := getattr(shard, name)) is not None}
    location = shard.location
    return {"identity": identity(location, labelled), "location": location, "samples": shard.samples, **known}


class SurveyNotes:
    """The notes of a folder: an interrupted survey goes on where it stopped, and one of a folder that has grown looks
    only at the shards that were added.

    Args:
        out: the folder.
        before: its index; it counts for shards of which nothing is noted. None = there is none.
        mode: permissions of the file; less, if what is noted already has secrets.
        afresh: whether to forget what is noted.
    """

    def __init__(self, out: Path, before: ShardIndex | None, mode: int, *, afresh: bool) -> None:
        self._path = out / _NAME
        self._noted = {} if afresh else self._read()
        # What was noted of other shards before is kept, with its secrets.
        self._mode = _PRIVATE if has_secret([entry["location"] for entry in self._noted.values()]) else mode
        if self._mode == _PRIVATE and self._path.exists():
            self._path.chmod(_PRIVATE)
        self._indexed = {} if afresh or before is None else self._of_index(before, out)

    def __getitem__(self, identity: str) -> Entry:
        return self._noted[identity] if identity in self._noted else self._indexed[identity]

    def get(self, identity: str) -> Entry | None:
        """The entry of a shard; None if nothing is known of it."""
        return self._noted.get(identity) or self._indexed.get(identity)

    def add(self, entries: Sequence[Entry]) -> None:
        """Note entries."""
        append_lines(self._path, [json.dumps(entry) for entry in entries], self._mode)
        self._noted.update({entry["identity"]: entry for entry in entries})

    def finish(self, used: Sequence[str]) -> None:
        """Write the file anew, with those that are used, and without what was noted of a shard before it changed.

        Args:
            used: identities of all shards of the index.
        """
        kept = {name: self[name] for name in used}
        places = {entry["location"] for entry in kept.values()}
        kept |= {name: entry for name, entry in self._noted.items() if entry["location"] not in places}
        write_whole(self._path, "".join(f"{json.dumps(entry)}\n" for entry in kept.values()), self._mode)

    def _read(self) -> dict[str, Entry]:
        found = {}
        for line in self._path.read_text().splitlines() if self._path.is_file() else []:
            try:
                entry = json.loads(line)
                found[entry["identity"]] = entry
            except (ValueError, TypeError, KeyError):
                continue  # cut off when the survey was killed
        return found

    def _of_index(self, before: ShardIndex, out: Path) -> dict[str, Entry]:
        noted = {entry["location"] for entry in self._noted.values()}
        found = {}
        for name, stream in before.streams.items():
            for shard in entries_of(before, name, str(out.absolute())):
                if shard.location not in noted:
                    with suppress(DataError, OSError):  # it is not there
                        if is_remote(shard.location) or Path(shard.location).stat().st_size == shard.bytes:
                            entry = entry_of(shard, stream.labelled)
                            found[entry["identity"]] = entry
        return found
