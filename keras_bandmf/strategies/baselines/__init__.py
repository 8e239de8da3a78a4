"""Strategies for comparison: trees, banded inverses, buffered and square-root matrices."""
