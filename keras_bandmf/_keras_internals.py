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
