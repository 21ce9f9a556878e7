"""Backbones, a module for each."""
