"""Which layer types have a clipping rule; users add their own."""

from __future__ import annotations

import keras

from keras_bandmf._keras_internals import recomputes_activations
from keras_bandmf.clipping.rowwise.decision import declare_row_wise
from keras_bandmf.clipping.rules.base import DenseRule, LayerRule
from keras_bandmf.clipping.rules.conv import (
    ConvRule,
    ConvTransposeRule,
    DepthwiseConvRule,
    SeparableConvRule,
)
from keras_bandmf.clipping.rules.einsum import EinsumDenseRule
from keras_bandmf.clipping.rules.embedding import EmbeddingRule, ReversibleEmbeddingRule
from keras_bandmf.clipping.rules.hub import rule_by_name
from keras_bandmf.clipping.rules.scale import (
    GroupNormalizationRule,
    LayerNormalizationRule,
    PReLURule,
    RMSNormalizationRule,
)

_OWN_RULE = "_keras_bandmf_rule"
# Only filled at import time: by this file, and by the module that defines a layer of one's own.
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
}
# Layers that the oldest Keras 3 does not have.
for _name, _rule in (
    ("RMSNormalization", RMSNormalizationRule()),
    ("ReversibleEmbedding", ReversibleEmbeddingRule()),
):
    if hasattr(keras.layers, _name):
        _RULES[getattr(keras.layers, _name)] = _rule


def register_rule(layer_class: type, rule: LayerRule) -> None:
    """Give layers of exactly `layer_class` a clipping rule.

    Subclasses are not covered: they may compute something else. `check_model` still compares the
    rule with one-example-at-a-time gradients on every model that uses it; `check_rule` does so for
    one layer. A rule for a layer that multiplies its inputs by a vector:

    ```python
    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, inputs):
            return inputs * self.scale

    class ScaleRule(clipping.LayerRule):
        def forward(self, layer, inputs):
            # The value of a weight without its gradient: that is what `gradients` is for.
            return inputs * clipping.constant(layer.scale), inputs

        def gradients(self, layer, saved, g):  # (batch, time, features) each
            products = tf.cast(saved, g.dtype) * g
            return [(layer.scale, clipping.Rows(tf.reduce_sum(products, axis=1)))]

    clipping.register_rule(Scale, ScaleRule())
    clipping.check_rule(Scale(), np.random.normal(size=(4, 5, 3)).astype("float32"))
    ```

    Factors: `Rows` for gradients written out, `Outer` for products x'g, `Lookup` for rows of a
    table. Axis 0 is the example in all of them; nothing may be summed over it. Registering a rule
    also declares that the layer treats rows independently, as `declare_row_wise` does.

    Args:
        layer_class: a subclass of `keras.layers.Layer` that has no rule yet.
        rule: a `LayerRule`.

    Raises:
        ValueError: not a layer class, not a rule, or the class has a rule already.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise ValueError(
            "`layer_class` must be a subclass of `keras.layers.Layer`. "
            f"Received: layer_class={layer_class!r}"
        )
    if not isinstance(rule, LayerRule):
        raise ValueError(
            "`rule` must be an instance of a `LayerRule` subclass that defines `forward` and "
            f"`gradients`. Received: rule={rule!r}"
        )
    if _known(layer_class) is not None:
        raise ValueError(
            f"{layer_class.__name__} already has a clipping rule. Register a rule for a subclass "
            f"of your own instead. Received: layer_class={layer_class!r}"
        )
    _RULES[layer_class] = rule
    declare_row_wise(layer_class)


def set_rule(layer: keras.layers.Layer, rule: LayerRule | None) -> None:
    """Gives one layer a rule of its own in place of that of its class; None takes it away."""
    if rule is None:
        vars(layer).pop(_OWN_RULE, None)
    else:
        # Past Keras' attribute tracking.
        vars(layer)[_OWN_RULE] = rule


def rule_of(layer: keras.layers.Layer) -> tuple[LayerRule | None, str]:
    """The rule of `layer`, or None, and why.

    Returns:
        (rule, the rule's name) or (None, the reason there is none).
    """
    rule = vars(layer).get(_OWN_RULE) or _known(type(layer))
    if rule is None:
        return None, f"no rule for {type(layer).__name__}"
    if "call" in vars(layer):
        return None, "its `call` was replaced on the instance"
    if recomputes_activations(layer):
        return None, "it recomputes its activations (remat)"
    reason = rule.refuses(layer)
    return (rule, type(rule).__name__) if reason is None else (None, reason)


def _known(layer_class: type) -> LayerRule | None:
    return _RULES.get(layer_class) or rule_by_name(layer_class)
