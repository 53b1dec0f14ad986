"""Tools for shard folders that exist: verify, show, and index shards of strangers."""
