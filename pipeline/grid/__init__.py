"""Studies: grids of runs over seeds, store, statistics and tables (docs/pipeline.md)."""
