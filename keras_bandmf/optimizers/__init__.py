"""BandMFOptimizer, its arguments, and its secret state."""

from keras_bandmf.optimizers.bandmf import BandMFOptimizer

__all__ = ["BandMFOptimizer"]
