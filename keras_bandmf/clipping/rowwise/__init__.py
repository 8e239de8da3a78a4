"""Decides which models are known to treat the rows of a batch independently."""
