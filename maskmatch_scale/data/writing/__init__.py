"""Writing shard folders from data sets, with the same bytes every time, and safe to kill at any moment.

`write_shards` writes any :class:`DataSource`. Those of image files are in `sources/`; the quickstart's is
`maskmatch_scale.scores`.
"""

from maskmatch_scale.data.writing.journal import SKIPPED_NAME
from maskmatch_scale.data.writing.protocol import DataSource, EncodedSample, Prepares, StreamItems
from maskmatch_scale.data.writing.write import write_shards

__all__ = ["SKIPPED_NAME", "DataSource", "EncodedSample", "Prepares", "StreamItems", "write_shards"]
