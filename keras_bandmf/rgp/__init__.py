"""Low-rank gradient carriers (RGP) for any Keras model."""

from keras_bandmf.rgp.model import (
    RGPConv2D,
    RGPDense,
    RGPEinsumDense,
    RGPEmbedding,
    enable_rgp,
    merge_rgp,
    public_carriers,
)

__all__ = [
    "RGPConv2D",
    "RGPDense",
    "RGPEinsumDense",
    "RGPEmbedding",
    "enable_rgp",
    "merge_rgp",
    "public_carriers",
]
