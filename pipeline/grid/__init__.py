"""Studies: grids of runs over seeds, their store, their statistics and tables (docs/studies.md)."""
