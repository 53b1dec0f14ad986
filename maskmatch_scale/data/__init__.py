"""Shards, the order of their samples, decoding and the weak view. Knows no model and no method."""
