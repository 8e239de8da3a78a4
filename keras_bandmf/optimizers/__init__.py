"""BandMFOptimizer, its arguments, its secret state, and an inner optimizer that knows the noise."""

from keras_bandmf.optimizers.bandmf import BandMFOptimizer
from keras_bandmf.optimizers.noise_aware import NoiseAwareAdam

__all__ = ["BandMFOptimizer", "NoiseAwareAdam"]
