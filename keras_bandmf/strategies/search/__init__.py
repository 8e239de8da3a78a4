"""Minimisers, preconditioners and the cache of the search for a strategy."""
