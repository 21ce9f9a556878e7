"""Optimisers, checkpoints, processes, metrics and the visible loop."""
