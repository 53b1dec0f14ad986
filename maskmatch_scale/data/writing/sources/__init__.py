"""Data sets that can be written as shards, one file each."""
