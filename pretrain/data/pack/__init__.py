"""From pictures to WebDataset shards with an index."""
