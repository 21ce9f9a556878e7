"""Probes of the features, linear evaluation, and pictures to look at."""
