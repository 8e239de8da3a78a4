"""Per-example gradients, clipped and summed."""

from keras_bandmf.clipping.checks import check_model
from keras_bandmf.clipping.clipped import ClippedGradients, clipped_gradients
from keras_bandmf.clipping.explain import Explanation, explain
from keras_bandmf.clipping.factors import Lookup, Outer, Rows
from keras_bandmf.clipping.layer_rules import LayerRule, constant
from keras_bandmf.clipping.registry import register_rule
from keras_bandmf.clipping.rule_checks import check_rule

__all__ = [
    "ClippedGradients",
    "Explanation",
    "LayerRule",
    "Lookup",
    "Outer",
    "Rows",
    "check_model",
    "check_rule",
    "clipped_gradients",
    "constant",
    "explain",
    "register_rule",
]
