"""`check_rule`: tests whether a clipping rule computes the gradients of its layer."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._keras_internals import all_layers
from keras_bandmf.clipping.clipper import accumulation_dtype
from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.paths.book_keeping import example_gradients, tapped
from keras_bandmf.clipping.shapes import dims, on_tensors


def check_rule(layer: keras.layers.Layer, x: Any, *args: Any, **kwargs: Any) -> float:
    """Compares a layer's clipping rule with gradients of one example at a time, eagerly.

    The loss of an example is the sum of the layer's outputs times fixed random numbers. Outputs,
    every example's gradient by every trainable variable, and its norm must agree. Use random
    weights and inputs: a scale of one or a bias of zero would hide mistakes. The test is sharpest
    in float64; a wrong axis shows in any dtype.

    Args:
        layer: A layer with a rule, or one made of such layers. It is built on `x` if it is not
            built yet.
        x: The layer's first input: an array or tensor with the example on axis 0, of at least two
            examples.
        *args: The layer's other inputs. Axis 0 of every array among them is the example.
        **kwargs: Other arguments of the layer's `call`. Axis 0 of every array among them is the
            example.

    Returns:
        The largest error, relative to the largest entry over all variables.

    Raises:
        ValueError: If the layer has no rule, an output has no example axis, the rule misses a
            weight, or the error is above 1e-9 in float64, 1e-4 in float32, or 5e-2 in bfloat16. The
            message names the variable.

    Formal guarantees: a test on a sample, not a proof.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_bandmf import clipping
        >>> layer = keras.layers.Dense(3, bias_initializer="normal", dtype="float64")
        >>> x = np.random.default_rng(0).normal(size=(4, 5))
        >>> clipping.check_rule(layer, x) < 1e-12
        True
    """
    (x, args, kwargs) = on_tensors(_tensor, (x, args, kwargs))
    rows = dims(x)[0]
    if rows < 2:
        raise ValueError(
            "Expected `x` to hold at least two examples, because with one a rule that mixes "
            "examples would pass. "
            f"Received: x of shape {tuple(x.shape)}"
        )
    expected_outputs = layer(x, *args, **kwargs)
    slopes = on_tensors(_random_like, expected_outputs)
    try:
        outputs, gradients, norms = _by_rule(layer, (x, args, kwargs), slopes)
    except Unsupported as reason:
        raise ValueError(
            f"Expected `layer` to take the book-keeping path, but: {reason}. Give it a rule with "
            f"`clipping.register_rule`. Received: layer={layer!r}"
        ) from None
    expected = _one_by_one(layer, (x, args, kwargs), slopes)

    tolerance = _tolerance(layer)
    worst = 0.0
    for a, b in zip(*map(keras.tree.flatten, (outputs, expected_outputs)), strict=True):
        worst = max(worst, _compare("its outputs", a, b, np.max(np.abs(b)), tolerance, layer))
    largest = max((np.max(np.abs(g)) for g in expected), default=0.0)
    for variable, a, b in zip(layer.trainable_variables, gradients, expected, strict=True):
        what = f"the gradient of {variable.path}"
        worst = max(worst, _compare(what, a, b, largest, tolerance, layer))
    exact = np.sqrt(sum(np.sum(np.square(g.reshape(rows, -1)), axis=1) for g in expected))
    if expected:
        worst = max(worst, _compare("its norms", norms, exact, np.max(exact), tolerance, layer))
    return worst


def _by_rule(layer: Any, inputs: tuple, slopes: Any) -> tuple[Any, list[np.ndarray], Any]:
    """Returns outputs, gradients of shape (rows, *variable) and their norms, by the rule."""
    x, args, kwargs = inputs
    variables = layer.trainable_variables
    values = [v.value for v in variables]
    records: list = []
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        with tapped(layer, tape, records):
            outputs = layer(x, *args, **kwargs)
    mask = tf.ones([dims(x)[0]], tf.bool)
    dtype = accumulation_dtype(variables)
    ends = keras.tree.flatten(outputs), keras.tree.flatten(slopes)
    factors, _ = example_gradients(tape, records, variables, *ends, mask, dtype)
    found = []
    for i, variable in enumerate(variables):
        rows = [
            factors[i].weighted_sum(tf.one_hot(j, dims(x)[0], dtype=dtype))
            if i in factors
            else tf.zeros(variable.shape)
            for j in range(dims(x)[0])
        ]
        found.append(np.stack([np.asarray(row, "float64") for row in rows]))
    squared = sum(np.asarray(f.squared_norms(), "float64") for f in factors.values())
    return outputs, found, np.sqrt(squared)


def _one_by_one(layer: Any, inputs: tuple, slopes: Any) -> list[np.ndarray]:
    """Returns the same gradients, with each example in a batch of its own."""
    values = [v.value for v in layer.trainable_variables]
    columns: list[list[np.ndarray]] = [[] for _ in values]
    for i in range(dims(inputs[0])[0]):
        x, args, kwargs = on_tensors(functools.partial(_row, i=i), inputs)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            outputs = keras.tree.flatten(layer(x, *args, **kwargs))
        own = [_row(s, i) for s in keras.tree.flatten(slopes)]
        zero = tf.UnconnectedGradients.ZERO
        found = tape.gradient(outputs, values, output_gradients=own, unconnected_gradients=zero)
        for column, g in zip(columns, found, strict=True):
            column.append(np.asarray(tf.cast(tf.convert_to_tensor(g), tf.float64)))
    return [np.stack(column) for column in columns]


def _compare(
    what: str, got: Any, expected: Any, scale: Any, tolerance: float, layer: keras.layers.Layer
) -> float:
    got, expected = (np.asarray(tf.cast(t, tf.float64)) for t in (got, expected))
    error = float(np.max(np.abs(got - expected), initial=0.0) / max(float(scale), 1e-30))
    if got.shape != expected.shape or not error <= tolerance:
        raise ValueError(
            f"The clipping rule of {type(layer).__name__} is wrong about {what}: it differs from "
            f"that of one example at a time by {error:.3g} of the largest entry. Rounding explains "
            f"at most {tolerance:g}. Received: layer={layer!r}"
        )
    return error


def _tensor(leaf: Any) -> Any:
    return tf.convert_to_tensor(leaf) if isinstance(leaf, (np.ndarray, tf.Tensor)) else leaf


def _row(leaf: Any, i: int) -> Any:
    return leaf[i : i + 1] if isinstance(leaf, tf.Tensor) else leaf


def _random_like(tensor: tf.Tensor) -> tf.Tensor:
    values = np.random.default_rng(0).normal(size=tensor.shape)
    return tf.cast(tf.constant(values), tensor.dtype)


def _tolerance(layer: keras.layers.Layer) -> float:
    dtypes = {part.compute_dtype for part in all_layers(layer)}
    dtypes.update(v.dtype for v in layer.trainable_variables)  # LoRA is always float32
    return 5e-2 if "bfloat16" in dtypes else 1e-9 if dtypes == {"float64"} else 1e-4
