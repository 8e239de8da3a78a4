"""Which layers own the trainable variables of a model."""

from __future__ import annotations

import keras


def trained_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Layers that own a trainable variable of `model`: the only ones that cost anything."""
    trainable = {id(v) for v in model.trainable_variables}
    return [
        layer
        for layer in model._flatten_layers()
        if any(id(v) in trainable for v in layer._trainable_variables)
    ]


def all_layers(layer: keras.layers.Layer, include_self: bool = True) -> list[keras.layers.Layer]:
    """Returns a layer or model and every layer inside it, at any depth, each once."""
    return list(layer._flatten_layers(include_self=include_self))


def own_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns all variables that a layer made itself, those of its inner layers left out."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]
