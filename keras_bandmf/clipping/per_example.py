"""The general path: exact for any model, one example at a time."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_bandmf.clipping.book_keeping import (
    Clipped,
    accumulation_dtype,
    clip_factors,
    forward,
)
from keras_bandmf.clipping.coordinates import released
from keras_bandmf.clipping.losses import BatchLoss


def clip_one_example(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any,
    mask: tf.Tensor,
    l2_norm_clip: float,
    loss: BatchLoss,
) -> Clipped:
    """The clipped gradient of a batch that holds one example.

    Args: as `clip_by_book_keeping`, every leading axis 1.

    Returns:
        `Clipped`; norms and losses have shape (1,).

    Formal guarantees: the joint norm of `sums` is at most `l2_norm_clip` up to rounding, and `sums`
    is exactly zero if the example is masked out or its gradient is not finite.
    """
    variables = model.trainable_variables
    values = [v.value for v in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        y_pred = forward(model, x)
        value = loss(x, y, y_pred, sample_weight)
    dtype = accumulation_dtype(variables)
    gradients = tape.gradient(value, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    gradients = [
        released(v, tf.cast(tf.convert_to_tensor(g), dtype))
        for v, g in zip(variables, gradients, strict=True)
    ]
    squared = tf.zeros((), dtype)
    for g in gradients:
        squared += tf.reduce_sum(tf.square(g))
    weights, norms = clip_factors(tf.reshape(squared, [1]), mask, l2_norm_clip)
    weight = weights[0]
    sums = [tf.where(weight > 0, g * weight, tf.zeros_like(g)) for g in gradients]
    return Clipped(sums, norms, tf.reshape(value, [1]), y_pred)
