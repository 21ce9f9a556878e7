"""The photometric operations, one module each."""
