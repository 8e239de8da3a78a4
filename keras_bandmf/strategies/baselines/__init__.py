"""Strategies without bands, for comparison: trees, banded inverses and buffered matrices."""
