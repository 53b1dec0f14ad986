"""Writing shard folders from data sets, with the same bytes every time, and safe to kill at any moment."""
