"""Shards as files: the index of a folder, the tar format, and reading a sample by its place."""
