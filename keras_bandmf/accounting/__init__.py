"""Epsilon and delta of sampled Gaussian mechanisms."""
