"""Layers whose kernels have low-rank gradient carriers (RGP)."""

from keras_bandmf.rgp.model import RGPConv2D, RGPDense, RGPEinsumDense, RGPEmbedding

__all__ = ["RGPConv2D", "RGPDense", "RGPEinsumDense", "RGPEmbedding"]


def __dir__() -> list[str]:
    return __all__
