"""Computes the gradient of each example, clips it, and adds up the results."""

from keras_bandmf.clipping.checks.model import check_model
from keras_bandmf.clipping.checks.rule import check_rule
from keras_bandmf.clipping.clipped import ClippedGradients, clipped_gradients
from keras_bandmf.clipping.factors import Factor, Lookup, Outer, Rows
from keras_bandmf.clipping.modes import (
    AdaptiveClipping,
    AutomaticClipping,
    ClippingMode,
    FlatClipping,
    PerLayerClipping,
    checked_mode,
)
from keras_bandmf.clipping.paths.explanation import Explanation, explain
from keras_bandmf.clipping.rowwise.decision import declare_row_wise
from keras_bandmf.clipping.rules.base import LayerRule, constant
from keras_bandmf.clipping.rules.registry import register_rule
from keras_bandmf.clipping.seeds import MaskSeeds

__all__ = [
    "AdaptiveClipping",
    "AutomaticClipping",
    "ClippedGradients",
    "ClippingMode",
    "Explanation",
    "Factor",
    "FlatClipping",
    "LayerRule",
    "Lookup",
    "MaskSeeds",
    "Outer",
    "PerLayerClipping",
    "Rows",
    "check_model",
    "check_rule",
    "checked_mode",
    "clipped_gradients",
    "constant",
    "declare_row_wise",
    "explain",
    "register_rule",
]


def __dir__() -> list[str]:
    return __all__
