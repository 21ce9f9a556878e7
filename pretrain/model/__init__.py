"""Backbone, heads, feature augmentation, losses and the assembly of them."""
