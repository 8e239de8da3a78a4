"""The general path: exact for any model, one example at a time."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_bandmf.clipping.clipper import Clipper
from keras_bandmf.clipping.coordinates import released
from keras_bandmf.clipping.losses import BatchLoss
from keras_bandmf.clipping.paths.book_keeping import Clipped, forward


def clip_one_example(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any,
    mask: tf.Tensor,
    clipper: Clipper,
    loss: BatchLoss,
) -> Clipped:
    """Returns the clipped gradient of a batch that holds one example.

    The arguments are those of `clip_by_book_keeping`, with 1 for the size of axis 0.

    Returns:
        `Clipped`; norms and losses have shape (1,).

    Formal guarantees: each group of variables in `sums` has a norm of at most the group's clip
    norm, up to rounding, and `sums` is exactly zero if the example is masked out or its gradient is
    not finite in any variable.
    """
    variables = model.trainable_variables
    values = [v.value for v in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        y_pred = forward(model, x)
        value = loss(x, y, y_pred, sample_weight)
    gradients = tape.gradient(value, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    gradients = [
        released(v, tf.cast(tf.convert_to_tensor(g), clipper.dtype))
        for v, g in zip(variables, gradients, strict=True)
    ]
    squared = [tf.reshape(tf.reduce_sum(tf.square(g)), [1]) for g in gradients]
    weights, norms, was_clipped = clipper.factors(squared, mask)
    sums = []
    for g, group in zip(gradients, clipper.groups, strict=True):
        weight = weights[group][0]
        sums.append(tf.where(weight > 0, g * weight, tf.zeros_like(g)))
    # One row has none to mix with.
    return Clipped(sums, norms, tf.reshape(value, [1]), was_clipped, y_pred, tf.constant(False))
