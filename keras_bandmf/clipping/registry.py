"""Which layer types have a clipping rule; users add their own."""

from __future__ import annotations

import keras

from keras_bandmf.clipping.conv_rules import ConvRule
from keras_bandmf.clipping.layer_rules import (
    DenseRule,
    EinsumDenseRule,
    EmbeddingRule,
    GroupNormalizationRule,
    LayerNormalizationRule,
    LayerRule,
)

_OWN_RULE = "_keras_bandmf_rule"
# Only filled at import time: by this file, and by the module that defines a layer of one's own.
_RULES: dict[type, LayerRule] = {
    keras.layers.Dense: DenseRule(),
    keras.layers.EinsumDense: EinsumDenseRule(),
    keras.layers.Embedding: EmbeddingRule(),
    keras.layers.LayerNormalization: LayerNormalizationRule(),
    keras.layers.GroupNormalization: GroupNormalizationRule(),
    keras.layers.Conv1D: ConvRule(),
    keras.layers.Conv2D: ConvRule(),
}


def register_rule(layer_class: type, rule: LayerRule) -> None:
    """Give layers of exactly `layer_class` a clipping rule.

    Subclasses are not covered: they may compute something else. `check_model` still compares the
    rule with one-example-at-a-time gradients on every model that uses it.

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
    if layer_class in _RULES:
        raise ValueError(
            f"{layer_class.__name__} already has a clipping rule. Register a rule for a subclass "
            f"of your own instead. Received: layer_class={layer_class!r}"
        )
    _RULES[layer_class] = rule


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
    rule = vars(layer).get(_OWN_RULE) or _RULES.get(type(layer))
    if rule is None:
        return None, f"no rule for {type(layer).__name__}"
    if "call" in vars(layer):
        return None, "its `call` was replaced on the instance"
    if getattr(layer, "_remat_mode", None):
        return None, "it recomputes its activations (remat)"
    reason = rule.refuses(layer)
    return (rule, type(rule).__name__) if reason is None else (None, reason)
