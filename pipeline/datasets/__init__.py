"""Data sets: generators, importers and the VOC devkit layout."""
