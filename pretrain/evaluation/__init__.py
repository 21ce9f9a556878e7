"""Frozen features, the kNN probe, collapse figures and pictures to look at."""
