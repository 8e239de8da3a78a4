"""The table of layer types that have a clipping rule. Users add their own."""

from __future__ import annotations

from typing import NamedTuple

import keras

from keras_bandmf._keras_internals import all_layers, recomputes_activations, trained_layers
from keras_bandmf.clipping.rowwise.decision import declare_row_wise, may_be_row_wise
from keras_bandmf.clipping.rules.base import DenseRule, LayerRule, called_method
from keras_bandmf.clipping.rules.by_example import ByExampleRule
from keras_bandmf.clipping.rules.conv import (
    ConvRule,
    ConvTransposeRule,
    DepthwiseConvRule,
    SeparableConvRule,
)
from keras_bandmf.clipping.rules.einsum import EinsumDenseRule
from keras_bandmf.clipping.rules.embedding import EmbeddingRule, ReversibleEmbeddingRule
from keras_bandmf.clipping.rules.hub import rule_by_name
from keras_bandmf.clipping.rules.recurrent import (
    AnyRecurrentRule,
    GRURule,
    LSTMRule,
    SimpleRNNRule,
)
from keras_bandmf.clipping.rules.recurrent_conv import ConvLSTMRule
from keras_bandmf.clipping.rules.scale import (
    GroupNormalizationRule,
    LayerNormalizationRule,
    PReLURule,
    RMSNormalizationRule,
)

_OWN_RULE = "_keras_bandmf_rule"
# Filled only at import time: by this file, and by modules that define custom layers.
_RULES: dict[type, LayerRule] = {
    keras.layers.Dense: DenseRule(),
    keras.layers.EinsumDense: EinsumDenseRule(),
    keras.layers.Embedding: EmbeddingRule(),
    keras.layers.LayerNormalization: LayerNormalizationRule(),
    keras.layers.GroupNormalization: GroupNormalizationRule(),
    keras.layers.PReLU: PReLURule(),
    keras.layers.Conv1D: ConvRule(),
    keras.layers.Conv2D: ConvRule(),
    keras.layers.Conv3D: ConvRule(),
    keras.layers.Conv1DTranspose: ConvTransposeRule(),
    keras.layers.Conv2DTranspose: ConvTransposeRule(),
    keras.layers.Conv3DTranspose: ConvTransposeRule(),
    keras.layers.DepthwiseConv1D: DepthwiseConvRule(),
    keras.layers.DepthwiseConv2D: DepthwiseConvRule(),
    keras.layers.SeparableConv1D: SeparableConvRule(),
    keras.layers.SeparableConv2D: SeparableConvRule(),
    keras.layers.LSTM: LSTMRule(),
    keras.layers.GRU: GRURule(),
    keras.layers.SimpleRNN: SimpleRNNRule(),
    keras.layers.ConvLSTM1D: ConvLSTMRule(),
    keras.layers.ConvLSTM2D: ConvLSTMRule(),
    keras.layers.ConvLSTM3D: ConvLSTMRule(),
    keras.layers.RNN: AnyRecurrentRule(
        {
            keras.layers.LSTMCell: LSTMRule(),
            keras.layers.GRUCell: GRURule(),
            keras.layers.SimpleRNNCell: SimpleRNNRule(),
        }
    ),
}
# Layers that the oldest Keras 3 does not have.
for _name, _rule in (
    ("RMSNormalization", RMSNormalizationRule()),
    ("ReversibleEmbedding", ReversibleEmbeddingRule()),
):
    if hasattr(keras.layers, _name):
        _RULES[getattr(keras.layers, _name)] = _rule


def register_rule(layer_class: type, rule: LayerRule) -> None:
    """Registers a clipping rule for layers of exactly `layer_class`.

    Subclasses are not covered, because they may compute something else. `check_model` still
    compares the rule with gradients of one example at a time on every model that uses it, and
    `check_rule` does so for one layer. Registering a rule also declares that the layer treats rows
    independently, as `declare_row_wise` does.

    The rule returns a factor for each variable: `Rows` for gradients written out, `Outer` for
    products x'g, `Lookup` for rows of a table. Axis 0 is the example in all of them, and nothing
    may be summed over it.

    Args:
        layer_class: A subclass of `keras.layers.Layer` that has no rule yet.
        rule: A `LayerRule`.

    Raises:
        ValueError: If `layer_class` is not a layer class or has a rule already, or if `rule` is not
            a rule.

    Example:
        A layer that multiplies its inputs by a vector, and its rule. `constant` gives the value of
        a weight without its gradient, which is the task of `gradients`.

        >>> import keras
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> from keras_bandmf import clipping
        >>> class Scale(keras.layers.Layer):
        ...     def build(self, shape):
        ...         self.scale = self.add_weight(shape=(shape[-1],), initializer="uniform")
        ...
        ...     def call(self, inputs):
        ...         return inputs * self.scale
        >>> class ScaleRule(clipping.LayerRule):
        ...     def forward(self, layer, inputs):
        ...         return inputs * clipping.constant(layer.scale), inputs
        ...
        ...     def gradients(self, layer, saved, g):  # (batch, time, features) each
        ...         products = tf.cast(saved, g.dtype) * g
        ...         return [(layer.scale, clipping.Rows(tf.reduce_sum(products, axis=1)))]
        >>> clipping.register_rule(Scale, ScaleRule())
        >>> x = np.random.default_rng(0).normal(size=(4, 5, 3))
        >>> clipping.check_rule(Scale(dtype="float64"), x) < 1e-12
        True
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise ValueError(
            "Expected `layer_class` to be a subclass of `keras.layers.Layer`. "
            f"Received: layer_class={layer_class!r}"
        )
    if not isinstance(rule, LayerRule):
        raise ValueError(
            "Expected `rule` to be an instance of a subclass of `LayerRule` that defines `forward` "
            f"and `gradients`. Received: rule={rule!r}"
        )
    if _known(layer_class) is not None:
        raise ValueError(
            f"Expected `layer_class` to be without a clipping rule, but {layer_class.__name__} "
            "already has one. Register a rule for a subclass of it instead. "
            f"Received: layer_class={layer_class!r}"
        )
    _RULES[layer_class] = rule
    declare_row_wise(layer_class)


def set_rule(layer: keras.layers.Layer, rule: LayerRule | None) -> None:
    """Gives one layer a rule in place of that of its class; None takes it away again."""
    if rule is None:
        vars(layer).pop(_OWN_RULE, None)
    else:
        # Bypasses Keras's attribute tracking.
        vars(layer)[_OWN_RULE] = rule


def rule_of(layer: keras.layers.Layer) -> tuple[LayerRule | None, str]:
    """Returns the rule of a layer, or None and the reason.

    A layer that is known to treat rows independently, or declared to, and has no rule that fits it,
    gets `ByExampleRule`.

    Returns:
        (The rule, its name and why it is this one), or (None, the reason why there is none).
    """
    rule = vars(layer).get(_OWN_RULE) or _known(type(layer))
    if called_method(layer) in vars(layer):
        return None, f"its `{called_method(layer)}` was replaced on the instance"
    if recomputes_activations(layer):
        return None, "it recomputes its activations (remat)"
    name = type(layer).__name__
    reason = f"no rule for {name}" if rule is None else rule.refuses(layer)
    if rule is not None and reason is None:
        return rule, type(rule).__name__
    if not may_be_row_wise(layer):
        return None, f"{reason}, and it is not known to treat rows independently"
    by_example = ByExampleRule(whole=isinstance(layer, keras.layers.RNN))
    why = by_example.refuses(layer)
    if why is not None:
        return None, f"{reason}, and {why}"
    return by_example, f"ByExampleRule: {reason}"


class AssignedRules(NamedTuple):
    """Which layers of a model are recorded.

    Attributes:
        rules: The layers to record and their rules.
        missing: For each other layer with weights to train that no rule stands for, why not.
    """

    rules: list[tuple[keras.layers.Layer, LayerRule]]
    missing: list[str]


def assigned_rules(model: keras.layers.Layer) -> AssignedRules:
    """Returns the rules of a model's layers: what the book-keeping path records.

    Args:
        model: A model or layer.
    """
    trainable = {id(v) for v in model.trainable_variables}
    trained = {id(layer) for layer in trained_layers(model)}
    layers = all_layers(model)
    rules = {id(layer): rule_of(layer) for layer in layers}
    inside: set[int] = set()
    for layer in layers:
        rule, _ = rules[id(layer)]
        if rule is not None and rule.whole:
            inside.update(id(part) for part in all_layers(layer, include_self=False))
    found = AssignedRules([], [])
    for layer in layers:
        if id(layer) in inside:
            continue
        rule, why = rules[id(layer)]
        if rule is None:
            if id(layer) in trained:
                found.missing.append(f"{layer.path}: {why}")
        elif id(layer) in trained or any(id(v) in trainable for v in rule.uses(layer)):
            found.rules.append((layer, rule))
    return found


def _known(layer_class: type) -> LayerRule | None:
    return _RULES.get(layer_class) or rule_by_name(layer_class)
