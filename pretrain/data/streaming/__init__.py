"""Shards that are read from front to end, without an index."""
