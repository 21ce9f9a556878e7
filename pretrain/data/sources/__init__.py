"""Where shards may lie: folders, patterns, servers; the cache of remote ones."""
