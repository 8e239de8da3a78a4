"""The general path: exact for any model, one example at a time."""

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf.clipping.attached import attached_to
from keras_bandmf.clipping.clipper import Clipper
from keras_bandmf.clipping.coordinates import released
from keras_bandmf.clipping.losses import BatchLoss
from keras_bandmf.clipping.paths.book_keeping import (
    Clipped,
    example_mask,
    forward,
    row_shares,
)
from keras_bandmf.clipping.shapes import on_tensors


def clip_one_example(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any,
    mask: tf.Tensor,
    clipper: Clipper,
    loss: BatchLoss,
    rows_per_example: int = 1,
) -> Clipped:
    """Returns the clipped gradient of a batch that holds one example.

    The arguments are those of `clip_by_book_keeping`, with `rows_per_example` rows on axis 0. The
    model sees each of them in a batch of its own.

    Returns:
        `Clipped`; norms have shape (1,), losses (rows_per_example,).

    Formal guarantees: each group of variables in `sums` has a norm of at most the group's clip
    norm, up to rounding, and `sums` is exactly zero if the example is masked out or its gradient is
    not finite in any variable.
    """
    shares = row_shares(mask, rows_per_example)
    totals: list[tf.Tensor] = []
    losses, outputs = [], []
    for row in range(rows_per_example):
        # Several rows never share a pass: one of them may be padding, and layers may mix rows.
        of_row = functools.partial(_row, row=row)
        data = (on_tensors(of_row, part) for part in (x, y, sample_weight))
        value, y_pred, gradients = _gradients_of_row(model, clipper, loss, *data)
        if rows_per_example > 1:
            share = tf.cast(shares[row], clipper.dtype)
            gradients = [tf.where(mask[row], g * share, tf.zeros_like(g)) for g in gradients]
        totals = [t + g for t, g in zip(totals, gradients, strict=True)] if totals else gradients
        losses.append(value)
        outputs.append(y_pred)
    squared = [tf.reshape(tf.reduce_sum(tf.square(g)), [1]) for g in totals]
    weights, norms, was_clipped = clipper.factors(squared, example_mask(mask, rows_per_example))
    sums = []
    for g, group in zip(totals, clipper.groups, strict=True):
        weight = weights[group][0]
        sums.append(tf.where(weight > 0, g * weight, tf.zeros_like(g)))
    attached = [[attached_to(t) for t in keras.tree.flatten(row)] for row in outputs]
    y_pred, attached = (_stacked(rows) for rows in (outputs, attached))
    # One row has none to mix with.
    mixed = tf.constant(False)
    return Clipped(sums, norms, tf.stack(losses), was_clipped, y_pred, attached, mixed)


def _gradients_of_row(
    model: keras.Model, clipper: Clipper, loss: BatchLoss, x: Any, y: Any, sample_weight: Any
) -> tuple[tf.Tensor, Any, list[tf.Tensor]]:
    """Returns loss (a scalar), outputs, and the gradient by each trainable variable."""
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
    return tf.reshape(value, []), y_pred, gradients


def _row(tensor: tf.Tensor, row: int) -> tf.Tensor:
    # A batch of one row stays the same object: a Keras mask may be attached to it.
    return tensor if tensor.shape[0] == 1 else tensor[row : row + 1]


def _stacked(rows: list[Any]) -> Any:
    """Returns structures of one row each as one of them all."""
    if len(rows) == 1:
        return rows[0]
    return keras.tree.map_structure(lambda *parts: tf.concat(parts, axis=0), *rows)
