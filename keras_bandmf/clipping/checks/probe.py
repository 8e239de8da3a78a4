"""The few rows that `check_model` works on, and what replaces them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._keras_internals import keras_mask, set_keras_mask
from keras_bandmf.clipping.shapes import on_tensors


def all_rows(*parts: Any) -> list[Any]:
    """Returns every structure as tensors; None stays None."""
    return [on_tensors(tf.convert_to_tensor, part) for part in parts]


# A prime that no other axis is likely to have.
FEW = 17


def few_rows(*parts: Any) -> list[Any]:
    """Returns the first `FEW` rows of every structure, as tensors; fewer are repeated.

    Raises:
        ValueError: If there is no row at all, or a leaf has no row axis.
    """

    def take(leaf: Any) -> tf.Tensor:
        rows = leaf[:FEW]
        shape = np.shape(rows)
        if not shape or shape[0] == 0:
            raise ValueError(
                "Expected at least one example, the example on axis 0 of every input. "
                f"Received: data of shape {np.shape(leaf)}"
            )
        return tf.gather(tf.convert_to_tensor(rows), [i % shape[0] for i in range(FEW)])

    return [on_tensors(take, part) for part in parts]


def each_row_repeated(data: Any) -> Iterator[tuple[int, Any]]:
    """Yields i, and `data` with all rows but i replaced by row i or by something new.

    Keras masks are those of `data`: only values change.
    """
    leaves = keras.tree.flatten(data)
    alike = all(
        bool(tf.reduce_all(tf.equal(t, tf.gather(t, [0] * FEW)))) for t in leaves if t is not None
    )
    for i in (0, 1, FEW - 1):

        def change(t: tf.Tensor, i: int = i) -> tf.Tensor:
            others = tf.gather(t, [i] * FEW)
            if alike:
                others = 1 - 2 * t if t.dtype.is_floating else tf.zeros_like(t)
            own = tf.reshape(tf.range(FEW) == i, [FEW] + [1] * (t.shape.rank - 1))
            changed = tf.where(own, t, others)
            mask = keras_mask(t)
            if mask is not None:
                set_keras_mask(changed, mask)
            return changed

        yield i, on_tensors(change, data)
