"""Checks the arguments of `enable_rgp` that name layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_bandmf._keras_internals import all_layers


def named_layers(
    argument: str, names: Any, every: Sequence[keras.layers.Layer]
) -> list[keras.layers.Layer]:
    """Returns the layers that a list of names, paths or layers stands for; none for None.

    Args:
        argument: The name of the argument, for messages.
        names: What was received.
        every: The layers of the model.

    Raises:
        TypeError: If it is not a list.
        ValueError: If an entry stands for no layer of the model.
    """
    if names is None:
        return []
    if isinstance(names, (str, keras.layers.Layer)) or not isinstance(names, Sequence):
        raise TypeError(
            f"Expected `{argument}` to be None or a list of names, paths or layers. "
            f"Received: {argument}={names!r}"
        )
    found: list[keras.layers.Layer] = []
    for name in names:
        own = [layer for layer in every if name is layer or name in (layer.name, layer.path)]
        if not own:
            raise ValueError(
                f"Expected `{argument}` to name layers of the model; "
                "`keras_bandmf.clipping.explain(model)` lists their paths. "
                f"Received: {name!r}, which is none of them"
            )
        found += own
    return found


def within(layers: Sequence[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """Returns the layers and all layers inside them."""
    return [part for layer in layers for part in all_layers(layer)]
