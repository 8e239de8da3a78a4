"""Correlated noise `C^-1 Z`, a row per step."""

from keras_bandmf.noise.correlated import CorrelatedNoise, NoiseRows

__all__ = ["CorrelatedNoise", "NoiseRows"]
