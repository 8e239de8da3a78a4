"""Epsilon when the group that the sampler draws for each example is secret."""
