"""Checks of the arguments of `enable_rgp` and of the RGP layers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras


def check_numbers(**values: Any) -> None:
    """Refuses anything but integers of at least 1 (`warmup_steps`: 0).

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(
                f"Argument `{name}` must be an integer. Received: {name}={value!r} of type "
                f"{type(value).__name__}"
            )
        least = 0 if name == "warmup_steps" else 1
        if value < least:
            raise ValueError(
                f"Argument `{name}` must be an integer of at least {least}. "
                f"Received: {name}={value!r}"
            )


def check_flag(**values: Any) -> None:
    """Refuses anything but True and False.

    Raises:
        TypeError: it is neither.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(
                f"Argument `{name}` must be True or False. Received: {name}={value!r} of type "
                f"{type(value).__name__}"
            )


def check_scale(head_scale: Any) -> None:
    """Refuses a scale that is not a positive finite number.

    Raises:
        ValueError: it is not.
    """
    real = isinstance(head_scale, numbers.Real) and not isinstance(head_scale, bool)
    if not real or not 0 < head_scale < math.inf:
        raise ValueError(
            "Argument `head_scale` must be a positive finite number. "
            f"Received: head_scale={head_scale!r}"
        )


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
    return [part for layer in layers for part in layer._flatten_layers()]
