"""A function of one row, applied to all rows at once, in graphs and eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_bandmf.clipping.checks.captures import refuse_products


def vectorized(function: Callable[[Any], Any], rows: Any, *, or_loop: bool = True) -> Any:
    """Returns `tf.vectorized_map(function, rows)`.

    Eagerly, TensorFlow traces a new function at each call, converts it by AutoGraph, and warns at
    the fifth. Here it traces as often, without the other two.

    Args:
        function: A function of a structure of tensors without the axis of rows.
        rows: The structure of tensors, with the row on axis 0.
        or_loop: Whether an operation that cannot be vectorized runs in a loop over the rows.

    Raises:
        PrivacyError: Eagerly, if it has products that may mix rows (`tiles`). In graphs
            `captures.Watch` finds them.
        ValueError: Without `or_loop`, an operation cannot be vectorized.
    """

    def run(rows: Any) -> Any:
        return tf.vectorized_map(function, rows, fallback_to_while_loop=or_loop)

    if not tf.executing_eagerly():
        return run(rows)
    traced = tf.function(run, autograph=False).get_concrete_function(rows)
    refuse_products(traced.graph)
    return traced(rows)
