"""Shards, their order, decoding and crops on the CPU, photometric augmentation on the device."""
