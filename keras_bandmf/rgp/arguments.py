"""Checks of the arguments of `enable_rgp` and of the RGP layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_bandmf._keras_internals import all_layers


def named_layers(
    argument: str, names: Any, every: Sequence[keras.layers.Layer]
) -> list[keras.layers.Layer]:
    """The layers a list of names, paths or layers stands for; none for None.

    Args:
        argument: its name, for messages.
        names: what was received.
        every: the layers of the model.

    Raises:
        TypeError: if it is no list.
        ValueError: if an entry stands for no layer of the model.
    """
    if names is None:
        return []
    if isinstance(names, (str, keras.layers.Layer)) or not isinstance(names, Sequence):
        raise TypeError(
            f"Argument `{argument}` must be None or a list of names, paths or layers. "
            f"Received: {argument}={names!r}"
        )
    found: list[keras.layers.Layer] = []
    for name in names:
        own = [layer for layer in every if name is layer or name in (layer.name, layer.path)]
        if not own:
            raise ValueError(
                f"Argument `{argument}` must name layers of the model. Received: {name!r}, which "
                "is none of them. `keras_bandmf.clipping.explain(model)` lists their paths."
            )
        found += own
    return found


def within(layers: Sequence[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """The layers and all layers inside them."""
    return [part for layer in layers for part in all_layers(layer)]
