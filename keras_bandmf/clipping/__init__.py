"""Per-example gradients, clipped and summed."""

from keras_bandmf.clipping.checks import check_model
from keras_bandmf.clipping.clipped import ClippedGradients, clipped_gradients
from keras_bandmf.clipping.explain import Explanation, explain
from keras_bandmf.clipping.layer_rules import LayerRule
from keras_bandmf.clipping.modes import (
    AutomaticClipping,
    ClippingMode,
    FlatClipping,
    PerLayerClipping,
    checked_mode,
)
from keras_bandmf.clipping.registry import register_rule

__all__ = [
    "AutomaticClipping",
    "ClippedGradients",
    "ClippingMode",
    "Explanation",
    "FlatClipping",
    "LayerRule",
    "PerLayerClipping",
    "check_model",
    "checked_mode",
    "clipped_gradients",
    "explain",
    "register_rule",
]
