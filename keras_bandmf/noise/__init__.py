"""Correlated noise `C^-1 Z`, one row for each step."""

from keras_bandmf.noise.correlated import CorrelatedNoise, NoiseRows

__all__ = ["CorrelatedNoise", "NoiseRows"]


def __dir__() -> list[str]:
    return __all__
