"""Differentially private training of Keras models with correlated noise."""

from keras_bandmf import callbacks, clipping, noise, strategies, tfx_input
from keras_bandmf.clipping import ClippedGradients, clipped_gradients
from keras_bandmf.optimizers.bandmf import BandMFOptimizer
from keras_bandmf.planning.band_choice import max_bands
from keras_bandmf.planning.calibration import compare_bands
from keras_bandmf.planning.keras_workload import workload_from_optimizer
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.progress import ProgressBar
from keras_bandmf.planning.statement import Statement
from keras_bandmf.release import export
from keras_bandmf.rgp import (
    RGPConv2D,
    RGPDense,
    RGPEinsumDense,
    RGPEmbedding,
    enable_rgp,
    merge_rgp,
)
from keras_bandmf.training.model_statement import statement
from keras_bandmf.training.private_training import privatize

__version__ = "0.1.0"

__all__ = [
    "BandMFOptimizer",
    "ClippedGradients",
    "ProgressBar",
    "RGPConv2D",
    "RGPDense",
    "RGPEinsumDense",
    "RGPEmbedding",
    "Statement",
    "TrainingPlan",
    "callbacks",
    "clipped_gradients",
    "clipping",
    "compare_bands",
    "enable_rgp",
    "export",
    "max_bands",
    "merge_rgp",
    "noise",
    "privatize",
    "statement",
    "strategies",
    "tfx_input",
    "workload_from_optimizer",
]
