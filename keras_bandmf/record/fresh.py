"""Tells whether a variable holds its initial values and nothing learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_bandmf._keras_internals import all_layers, own_weights

_ATTRIBUTE = "_keras_bandmf_initializers"
_MOST_VALUES = 10**8  # of a model; beyond it, looking costs seconds
_PLAIN = (bool, int, float, str, type(None))


def note_initializers(model: keras.Model) -> None:
    """Notes on each variable of a built model which initializers its layer may have made it with.

    Args:
        model: The model, built.
    """
    for layer in all_layers(model):
        found = {
            name: value
            for name, value in vars(layer).items()
            if isinstance(value, keras.initializers.Initializer) and _repeats(value)
        }
        for variable in own_weights(layer):
            first = [v for name, v in found.items() if name == f"{variable.name}_initializer"]
            rest = [v for v in found.values() if v not in first]
            candidates: list[Any] = [*first, *rest]
            forgets = getattr(layer, "unit_forget_bias", False) and variable.name == "bias"
            if forgets and "bias_initializer" in found:
                candidates.insert(0, _forget_bias(layer))
            if isinstance(layer, keras.layers.EinsumDense) and variable.name == "kernel":
                candidates += [_with_axes(layer, one) for one in found.values()]
            setattr(variable, _ATTRIBUTE, candidates)


def is_fresh(variable: keras.Variable) -> bool:
    """Returns whether the value is, bit for bit, what an initializer of its layer gives.

    Formal guarantees:
        True only if the value is all zeros, all ones, or equal to what an initializer of Keras,
        whose settings are plain numbers with a fixed seed, gives again: it is then a function of
        the seed alone. An initializer that holds an array, a seed generator or code of the user
        proves nothing.

    Args:
        variable: The variable; `note_initializers` should have seen its layer.

    Returns:
        Whether the value is known to be an initial one.
    """
    value = np.asarray(keras.ops.convert_to_numpy(variable))
    if np.all(value == 0) or np.all(value == 1):
        return True
    for initializer in getattr(variable, _ATTRIBUTE, ()):
        try:
            again = initializer(tuple(variable.shape), dtype=variable.dtype)
        except (IndexError, TypeError, ValueError):
            continue  # It was made for another variable of the layer, of another rank.
        if np.array_equal(np.asarray(keras.ops.convert_to_numpy(again)), value):
            return True
    return False


def is_noted(variable: keras.Variable) -> bool:
    """Returns whether `note_initializers` has seen the layer of the variable."""
    return hasattr(variable, _ATTRIBUTE)


def small_enough(variables: Sequence[keras.Variable]) -> bool:
    """Returns whether all values can be looked at in about a second."""
    return sum(int(np.prod(variable.shape)) for variable in variables) <= _MOST_VALUES


def _repeats(initializer: keras.initializers.Initializer) -> bool:
    own = type(initializer).__module__.split(".")[0] == "keras"
    return own and all(isinstance(value, _PLAIN) for value in vars(initializer).values())


def _with_axes(
    layer: keras.layers.EinsumDense, initializer: keras.initializers.Initializer
) -> keras.initializers.Initializer:
    """Returns the initializer as EinsumDense scales it: by summed axes, and by the others."""
    config = initializer.get_config()
    if "input_axes" not in config:
        return initializer
    operands, outputs = layer.equation.split("->")
    kernel = operands.split(",")[1]
    axes = {
        "input_axes": [i for i, axis in enumerate(kernel) if axis not in outputs],
        "output_axes": [i for i, axis in enumerate(kernel) if axis in outputs],
    }
    return type(initializer).from_config({**config, **axes, "seed": initializer.seed})


def _forget_bias(layer: keras.layers.Layer) -> Callable[..., Any]:
    """Returns the initializer of an LSTM's bias, which Keras makes in a function of its own."""

    def initializer(shape: tuple[int, ...], dtype: str) -> Any:
        units = shape[0] // 4
        bias = layer.bias_initializer
        parts = [bias((units,), dtype=dtype), keras.ops.ones((units,), dtype=dtype)]
        return keras.ops.concatenate([*parts, bias((2 * units,), dtype=dtype)])

    return initializer
