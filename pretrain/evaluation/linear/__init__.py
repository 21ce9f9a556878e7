"""Linear evaluation: what a linear classifier or its neighbours tell of frozen features."""
