"""Correlated noise `C^-1 Z`, one row for each step."""

from keras_bandmf.noise.correlated import CorrelatedNoise, NoiseRows
from keras_bandmf.noise.regenerated import RegeneratedNoise
from keras_bandmf.noise.taps import NoiseTaps

__all__ = ["CorrelatedNoise", "NoiseRows", "NoiseTaps", "RegeneratedNoise"]


def __dir__() -> list[str]:
    return __all__
