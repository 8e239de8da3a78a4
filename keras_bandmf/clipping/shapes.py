"""Shapes that are static where known and dynamic where not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


def dims(tensor: tf.Tensor) -> list[Any]:
    """Returns the sizes of a tensor: a Python int where static, else a scalar int32 tensor."""
    known = tensor.shape.as_list()
    if None not in known:
        return known
    # One operation for all axes: slices are five for each.
    found = tf.unstack(tf.shape(tensor))
    return [size if d is None else d for size, d in zip(found, known, strict=True)]


def product(sizes: list[Any]) -> Any:
    """Returns the product of `sizes` (ints or scalar tensors); 1 for none."""
    return math.prod(sizes)


def static(size: Any) -> int | None:
    """Returns `size` as a Python int, or None if it is known only when the graph runs."""
    return size if isinstance(size, int) else None


def over_rows(row_values: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Returns `row_values`, (batch,), reshaped to broadcast over the other axes of `like`."""
    return tf.reshape(row_values, [-1] + [1] * (like.shape.rank - 1))


def by_example(tensor: tf.Tensor, rows_per_example: int) -> tf.Tensor:
    """Returns (rows, ...) as (examples, rows of an example, ...)."""
    sizes = dims(tensor)
    return tf.reshape(tensor, [sizes[0] // rows_per_example, rows_per_example, *sizes[1:]])


def merge_rows(tensor: tf.Tensor) -> tf.Tensor:
    """Returns (examples, rows of an example, ...) as (rows, ...), the inverse of `by_example`."""
    first, second, *rest = dims(tensor)
    return tf.reshape(tensor, [first * second, *rest])


def positions(tensor: tf.Tensor) -> tf.Tensor:
    """Returns (batch, ..., features) as (batch, 1, positions, features): one group."""
    sizes = dims(tensor)
    return tf.reshape(tensor, [sizes[0], 1, product(sizes[1:-1]), sizes[-1]])


def sum_to(tensor: tf.Tensor, shape: tuple[int, ...]) -> tf.Tensor:
    """Undoes a broadcast example by example: (batch, ...) summed to (batch, *shape).

    Args:
        tensor: The gradient of an output of shape (batch, ...).
        shape: The shape of the variable that was broadcast to it, aligned on the right.

    Returns:
        Tensor of shape (batch, *shape).
    """
    rank = tensor.shape.rank
    lead = rank - len(shape)
    axes = list(range(1, lead)) + [lead + i for i, d in enumerate(shape) if d == 1 and lead + i > 0]
    if axes:
        tensor = tf.reduce_sum(tensor, axis=axes)
    return tf.reshape(tensor, [dims(tensor)[0], *shape])


def on_tensors(function: Callable[[Any], Any], data: Any) -> Any:
    """Returns `function` of every leaf of a structure; None stays None."""
    return keras.tree.map_structure(lambda t: None if t is None else function(t), data)
