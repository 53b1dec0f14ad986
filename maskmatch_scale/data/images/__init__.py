"""Bytes to pixels and back: one decoder for images and one for label maps, for readers and for writers of shards."""
