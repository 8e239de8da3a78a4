"""The three rows `check_model` works on, and what it replaces them by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf.clipping.shapes import on_tensors


def all_rows(*parts: Any) -> list[Any]:
    """Every structure as tensors, None kept."""
    return [on_tensors(tf.convert_to_tensor, part) for part in parts]


def three_rows(*parts: Any) -> list[Any]:
    """The first three rows of every structure, as tensors; fewer are repeated.

    Raises:
        ValueError: no row at all, or leaves without a row axis.
    """

    def take(leaf: Any) -> tf.Tensor:
        rows = leaf[:3]
        shape = np.shape(rows)
        if not shape or shape[0] == 0:
            raise ValueError(
                "Expected at least one example, the example on axis 0 of every input. "
                f"Received: data of shape {np.shape(leaf)}"
            )
        return tf.gather(tf.convert_to_tensor(rows), [i % shape[0] for i in range(3)])

    return [on_tensors(take, part) for part in parts]


def each_row_repeated(data: Any) -> Iterator[Any]:
    """For i = 0, 1, 2: `data` with the two other rows replaced by row i, or by something new.

    Keras masks are those of `data`: only values change.
    """
    leaves = keras.tree.flatten(data)
    alike = all(
        bool(tf.reduce_all(tf.equal(t, tf.gather(t, [0, 0, 0])))) for t in leaves if t is not None
    )
    for i in range(3):

        def change(t: tf.Tensor, i: int = i) -> tf.Tensor:
            others = tf.gather(t, [i, i, i])
            if alike:
                others = 1 - 2 * t if t.dtype.is_floating else tf.zeros_like(t)
            own = tf.reshape(tf.range(3) == i, [3] + [1] * (t.shape.rank - 1))
            changed = tf.where(own, t, others)
            mask = getattr(t, "_keras_mask", None)
            if mask is not None:
                changed._keras_mask = mask
            return changed

        yield on_tensors(change, data)
