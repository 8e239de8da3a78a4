"""The losses of Keras that take every row by itself, computed on all rows at once."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import function_of_loss
from keras_bandmf.clipping.shapes import dims, over_rows

_L = keras.losses
# They compare numbers with numbers in the same places, and take means over the last axis at most.
_BY_PLACE = (
    _L.mean_squared_error,
    _L.mean_absolute_error,
    _L.mean_absolute_percentage_error,
    _L.mean_squared_logarithmic_error,
    _L.huber,
    _L.log_cosh,
    _L.kl_divergence,
    _L.poisson,
    _L.binary_crossentropy,
    _L.categorical_crossentropy,
)
# Targets are numbers of classes: they have no axis of classes, or one of length 1.
_BY_CLASS = (_L.sparse_categorical_crossentropy,)
_REDUCTIONS = {
    "sum_over_batch_size": tf.reduce_mean,
    "mean": tf.reduce_mean,
    "sum": tf.reduce_sum,
    "none": tf.reduce_sum,
    None: tf.reduce_sum,
}


def losses_of_rows(
    loss: keras.losses.Loss, y: Any, y_pred: tf.Tensor, sample_weight: Any
) -> tf.Tensor | None:
    """Returns the loss of every row, what `loss` gives on a batch of that row, or None if unknown.

    Args:
        loss: A loss that `compile` resolved for a model with one output.
        y: The targets.
        y_pred: The outputs, with the logits that Keras may have hung on them, and without a mask.
        sample_weight: None, or weights of the rows or of their places.

    Returns:
        Shape (batch,), or None: for other losses than Keras's own of the list above, their
        subclasses, arguments that couple places, and shapes that broadcasting would have to match.

    Raises:
        tf.errors.InvalidArgumentError: If the arguments differ in their number of rows.

    Formal guarantees: row i is a function of row i of the arguments alone. Its derivative by the
        outputs is that of the loss of a batch of one. It rests on what Keras's functions of the
        list compute, which tests compare with batches of one.
    """
    found = function_of_loss(loss)
    if found is None or loss.reduction not in _REDUCTIONS:
        return None
    function, settings = found
    if settings.get("axis", -1) != -1 or settings.get("ignore_class") is not None:
        return None
    if not all(
        setting is None or isinstance(setting, (int, float)) for setting in settings.values()
    ):
        return None
    if not isinstance(y, tf.Tensor) or not _in_step(function, y.shape, y_pred.shape):
        return None
    # As the loss itself converts them; outputs of its own dtype keep their logits.
    y_pred = keras.ops.convert_to_tensor(y_pred, dtype=loss.dtype)
    y = keras.ops.convert_to_tensor(y, dtype=loss.dtype)
    y = _with_rows_of(y, y_pred)
    values = tf.cast(loss.call(y, y_pred), loss.dtype)
    if sample_weight is not None:
        if not (sample_weight.shape.rank == 1 or _same_places(sample_weight.shape, values.shape)):
            return None
        sample_weight = _with_rows_of(tf.cast(sample_weight, values.dtype), y_pred)
        # Weights of rows count for all places of the row.
        by_row = sample_weight.shape.rank == 1
        values *= over_rows(sample_weight, values) if by_row else sample_weight
    axes = list(range(1, values.shape.rank))
    return _REDUCTIONS[loss.reduction](values, axis=axes) if axes else values


def _in_step(function: Any, y: tf.TensorShape, y_pred: tf.TensorShape) -> bool:
    """Returns whether targets and outputs match without broadcasting, whatever the batch is."""
    if y.rank is None or y_pred.rank is None or y_pred.rank < 2 or y.rank < 1:
        return False
    if function in _BY_CLASS:
        return _same_places(y, y_pred[:-1]) or (y[-1] == 1 and _same_places(y[:-1], y_pred[:-1]))
    if function in _BY_PLACE:
        return _same_places(y, y_pred) or (y_pred[-1] == 1 and _same_places(y, y_pred[:-1]))
    return False


def _same_places(one: tf.TensorShape, other: tf.TensorShape) -> bool:
    """Returns whether two shapes agree on every axis but that of the rows, and are known there."""
    known = one.rank == other.rank and one.rank >= 1
    return known and None not in [*one[1:]] and [*one[1:]] == [*other[1:]]


def _with_rows_of(tensor: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Returns a tensor that must have as many rows as another: one would be broadcast to all."""
    rows = dims(like)[0]
    same = tf.debugging.assert_equal(
        dims(tensor)[0], rows, "The targets, outputs and weights of a loss must have the same rows"
    )
    with tf.control_dependencies([same]):
        # XLA drops the assertion. Without XLA the graph is optimized to one that trusts `rows`.
        return tf.reshape(tensor, [rows, *tensor.shape[1:]])
