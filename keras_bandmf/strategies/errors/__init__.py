"""The expected error of a strategy, and its gradient, without a dense matrix."""
