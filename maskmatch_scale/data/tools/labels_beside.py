"""Label maps that a survey was not told of: they would be left out without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.remote.address import join
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.redact import is_remote


def streams_with_labels_beside(index: ShardIndex, root: Path) -> Iterator[str]:
    """Names of unlabelled streams whose first shard has a `.png` beside every image, if it is a local file.

    Args:
        index: of the folder.
        root: the folder.
    """
    for name, stream in index.streams.items():
        if stream.labelled or not len(stream.shards):
            continue
        location = join(str(root), stream.shards.file(0))
        if is_remote(location):
            continue  # it would be fetched for this alone
        with suppress(OSError, BadSample), Path(location).open("rb") as file:
            table = read_table(file, location, labelled=True)
            if len(table) and not any(table.faults()):
                yield name
