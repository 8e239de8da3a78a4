"""The head of a model: the layers that make its outputs. They get no carriers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._keras_internals import (
    call_that_made,
    graph_inside,
    inner_layers,
    own_trainable_variables,
)
from keras_bandmf.clipping import LayerRule
from keras_bandmf.clipping.coordinates import set_coordinates
from keras_bandmf.clipping.factors import Factor
from keras_bandmf.clipping.rules.registry import set_rule
from keras_bandmf.rgp.layouts import carried_kernel
from keras_bandmf.rgp.rules import ForwardedRule, type_rule


def head_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the layers with a kernel that are last on the way to an output.

    Args:
        model: A built model. If it is not functional, the way is not known, and its last layer
            with a kernel is taken for the head.
    """
    functional = _functional(model)
    if functional is not None:
        found: list[keras.layers.Layer] = []
        seen: set[int] = set()
        waiting = list(keras.tree.flatten(functional.outputs))
        while waiting:
            operation, call = call_that_made(waiting.pop())
            if id(operation) in seen:
                continue
            seen.add(id(operation))
            inner = _last_kernel(operation)
            if inner:
                found += inner
            elif call is not None:
                waiting += call.input_tensors
        return found
    return _last_kernel(model)


def _last_kernel(operation: object) -> list[keras.layers.Layer]:
    if not isinstance(operation, keras.layers.Layer):
        return []
    if isinstance(operation, keras.Model) and _functional(operation) is not None:
        return head_layers(operation)
    # Not `all_layers`, whose order is not that of the attributes.
    for child in reversed(inner_layers(operation)):
        found = _last_kernel(child)
        if found:
            return found
    return [] if isinstance(carried_kernel(operation), str) else [operation]


def _functional(model: keras.Model) -> keras.Model | None:
    model = graph_inside(model) or model
    return model if hasattr(model, "operations") else None


class HeadScale:
    """Coordinates of a variable of the head: its gradient times a constant.

    The head's gradients are made smaller, so that they take less of the clip norm and leave more to
    the carriers. The noise is the same.
    """

    def __init__(self, scale: float, shape: tuple[int, ...]):
        self.scale = scale
        self.shape = shape

    @property
    def description(self) -> list[Any]:
        """What must be equal for a checkpoint to fit, as JSON."""
        return ["head_scale", self.scale]

    def of(self, gradient: tf.Tensor) -> tf.Tensor:
        """Returns the gradient times the scale."""
        return gradient * tf.cast(self.scale, gradient.dtype)

    def reconstruct(self, coordinates: tf.Tensor) -> tf.Tensor:
        """Returns the coordinates as they are: the paper's code does not scale them back."""
        return coordinates

    def start(self, kernel: Any, key: np.ndarray, index: int) -> None:
        """Does nothing: there is nothing to draw."""

    def refresh(self, kernel: Any, step: tf.Tensor, replica: int) -> None:
        """Does nothing: the scale is fixed."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns nothing: there is no state."""
        return {}

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Does nothing: there is no state."""


class ScaledRule(ForwardedRule):
    """The rule of a head: factors are linear in the gradient of the pre-activation."""

    def __init__(self, rule: LayerRule, scale: float):
        super().__init__(rule)
        self.scale = scale

    def gradients(
        self, layer: keras.layers.Layer, saved: Any, g: tf.Tensor
    ) -> Sequence[tuple[keras.Variable, Factor]]:
        """Returns the gradients of the rule of the layer's type, times the scale."""
        return self.rule.gradients(layer, saved, g * tf.cast(self.scale, g.dtype))


def scale_head(
    head: Sequence[keras.layers.Layer], carried: Sequence[keras.layers.Layer], scale: float
) -> None:
    """Scales the per-example gradients of the head before clipping.

    Raises:
        ValueError: If a layer of the head is to get carriers too.
    """
    for layer in head:
        if any(layer is other for other in carried):
            raise ValueError(
                "Expected a head without carriers, for which `head_scale` is meant. Leave it out "
                f"of `layers`. Received: head_scale={scale} and '{layer.path}' in `layers`"
            )
    for layer in head:
        set_rule(layer, ScaledRule(type_rule(layer), scale))
        for variable in own_trainable_variables(layer):
            set_coordinates(variable, HeadScale(scale, tuple(variable.shape)))
