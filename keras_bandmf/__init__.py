"""Differentially private training of Keras models with correlated noise."""

import importlib
import types

from keras_bandmf import audit, callbacks, clipping, layers, noise, sources, strategies, tfx_input
from keras_bandmf._checks import PrivacyError
from keras_bandmf.clipping import ClippedGradients, clipped_gradients
from keras_bandmf.optimizers import BandMFOptimizer, NoiseAwareAdam
from keras_bandmf.planning.band_choice import BandChoice, max_bands_for_memory
from keras_bandmf.planning.calibration import compare_bands
from keras_bandmf.planning.group_privacy import group_epsilon
from keras_bandmf.planning.keras_workload import workload_from_optimizer
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.planning.progress import ProgressBar
from keras_bandmf.planning.statement import Statement
from keras_bandmf.release import export
from keras_bandmf.rgp import enable_rgp, merge_rgp, public_carriers
from keras_bandmf.sampling import PrivateBatches
from keras_bandmf.training.model_statement import statement
from keras_bandmf.training.private_training import privatize

#: The name that Opacus and JAX Privacy use for `privatize`.
make_private = privatize

__version__ = "0.1.0"

__all__ = [
    "BandChoice",
    "BandMFOptimizer",
    "ClippedGradients",
    "NoiseAwareAdam",
    "PrivacyError",
    "PrivateBatches",
    "ProgressBar",
    "Statement",
    "TrainingPlan",
    "__version__",
    "audit",
    "callbacks",
    "clipped_gradients",
    "clipping",
    "compare_bands",
    "enable_rgp",
    "export",
    "group_epsilon",
    "layers",
    "make_private",
    "max_bands_for_memory",
    "merge_rgp",
    "noise",
    "privatize",
    "public_carriers",
    "sources",
    "statement",
    "strategies",
    "tfx_input",
    "workload_from_optimizer",
]


def __getattr__(name: str) -> types.ModuleType:
    """Imports `tf_privacy` when it is asked for: it needs an extra."""
    if name == "tf_privacy":
        return importlib.import_module(f"{__name__}.tf_privacy")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists public names only. The other modules of the package are found by their paths."""
    return __all__
