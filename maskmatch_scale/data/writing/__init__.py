"""Writing shard folders from data sets, with the same bytes every time, and safe to kill at any moment.

`write_shards` writes any :class:`DataSource`. Those of image files are in `sources/`; the quickstart's is
`maskmatch_scale.scores`. `append_shards` appends to a folder, `merge_shards` puts folders together.
"""

from maskmatch_scale.data.writing.append import Appended, append_shards
from maskmatch_scale.data.writing.journal import DUPLICATES_NAME, SKIPPED_NAME
from maskmatch_scale.data.writing.merge import Joined, merge_shards
from maskmatch_scale.data.writing.parts import Part
from maskmatch_scale.data.writing.protocol import Added, Appends, DataSource, EncodedSample, Prepares, StreamItems
from maskmatch_scale.data.writing.write import write_shards

__all__ = [
    "DUPLICATES_NAME",
    "SKIPPED_NAME",
    "Added",
    "Appended",
    "Appends",
    "DataSource",
    "EncodedSample",
    "Joined",
    "Part",
    "Prepares",
    "StreamItems",
    "append_shards",
    "merge_shards",
    "write_shards",
]
