"""The losses of all examples at once, and their gradients (slopes) by the model's outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bandmf._checks import PrivacyError
from keras_bandmf._keras_internals import only_loss
from keras_bandmf.clipping.attached import attached_to, with_attached
from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.known_losses import losses_of_rows
from keras_bandmf.clipping.losses import BatchLoss
from keras_bandmf.clipping.vectorized import vectorized


class RowLosses(NamedTuple):
    """Losses of all examples and where backpropagation starts.

    Attributes:
        losses: Shape (batch,).
        outputs: The tensors of the forward pass that the losses depend on.
        slopes: The gradient of the summed losses by each of `outputs`.
    """

    losses: tf.Tensor
    outputs: list[tf.Tensor]
    slopes: list[tf.Tensor]


def per_example_losses(
    loss: BatchLoss, y: Any, y_pred: Any, sample_weight: Any, weights: Any = ()
) -> RowLosses:
    """Returns the loss of every example: `loss` on a batch of that one row.

    Sample weights, temporal weights, masks, several outputs and loss weights act as they do there.
    A loss of Keras that takes rows by themselves (`known_losses`) is computed on all of them.
    Others are vectorized, layers never are. Their slopes are taken row by row, too, not from the
    vectorized loss: under XLA its gradient made every step as slow as a compilation (measured).

    Args:
        loss: A loss from `batch_loss`. It must not read x.
        y: The targets, a structure of tensors with the example on axis 0, or None.
        y_pred: The outputs of the model on the whole batch.
        sample_weight: None, a tensor, or a structure of tensors.
        weights: Variables that the loss must not read by itself.

    Raises:
        Unsupported: If the loss reads one of `weights`.
    """
    known = _of_known_loss(loss, y, y_pred, sample_weight)
    if known is not None:
        return known
    parts = (y, y_pred, sample_weight)
    leaves = [[_Leaf(leaf) for leaf in keras.tree.flatten(part)] for part in parts]
    outputs = [t for leaf in leaves[1] for t in leaf.tensors if t.dtype.is_floating]
    used = [True] * len(outputs)

    def one(rows: list[list[list[tf.Tensor]]]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        rows = tf.nest.map_structure(lambda row: tf.expand_dims(row, 0), rows)
        sources = [t for leaf in rows[1] for t in leaf if t.dtype.is_floating]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([sources, weights])
            single = [
                keras.tree.pack_sequence_as(
                    part, [leaf.of_row(row) for leaf, row in zip(column, values, strict=True)]
                )
                for part, column, values in zip(parts, leaves, rows, strict=True)
            ]
            value = tf.cast(loss(None, *single), keras.config.floatx())
        slopes, direct = tape.gradient(value, (sources, list(weights)))
        if any(g is not None for g in direct):
            raise Unsupported("the loss reads a weight of the model by itself")
        used[:] = [slope is not None for slope in slopes]
        return value, [tf.convert_to_tensor(slope)[0] for slope in slopes if slope is not None]

    # The tape of the forward pass must not record what happens here.
    tensors = [[[tf.stop_gradient(t) for t in leaf.tensors] for leaf in part] for part in leaves]
    try:
        losses, slopes = vectorized(one, tensors)
    except (PrivacyError, Unsupported):
        raise
    except Exception:  # an operation that cannot be vectorized, or a mistake, which `map_fn` shows
        kept = [t.dtype for t, u in zip(outputs, used, strict=True) if u]
        signature = (tf.as_dtype(keras.config.floatx()), kept)
        losses, slopes = tf.map_fn(one, tensors, fn_output_signature=signature)
    outputs = [t for t, u in zip(outputs, used, strict=True) if u]
    return RowLosses(losses, outputs, slopes)


def _of_known_loss(loss: BatchLoss, y: Any, y_pred: Any, sample_weight: Any) -> RowLosses | None:
    """Returns the losses of a model with one output by `known_losses`, or None."""
    if loss.compiled is None or any(map(keras.tree.is_nested, (y, y_pred, sample_weight))):
        return None
    output = _Leaf(y_pred)
    if y is None or "mask" in output.names or not y_pred.dtype.is_floating:
        return None
    single = only_loss(loss.compiled, y, y_pred)
    if single is None:
        return None
    # The tape of the forward pass must not record what happens here.
    tensors = [tf.stop_gradient(t) for t in output.tensors]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tensors)
        losses = losses_of_rows(single, y, output.of_row(tensors), sample_weight)
        if losses is None:
            return None
        total = tf.reduce_sum(losses)
    slopes = tape.gradient(total, tensors)
    used = [
        (t, tf.convert_to_tensor(s))
        for t, s in zip(output.tensors, slopes, strict=True)
        if s is not None
    ]
    return RowLosses(
        tf.cast(losses, keras.config.floatx()), [t for t, _ in used], [s for _, s in used]
    )


class _Leaf:
    """A tensor and what Keras hangs on it and reads in losses: its mask and its logits."""

    def __init__(self, leaf: tf.Tensor | None):
        attached = attached_to(leaf)
        self.names = list(attached)
        self.tensors = [] if leaf is None else [leaf, *attached.values()]

    def of_row(self, rows: list[tf.Tensor]) -> tf.Tensor | None:
        """Returns the same for a batch of one, given `tensors` of that batch."""
        if not rows:
            return None
        leaf, *rest = rows
        return with_attached(leaf, dict(zip(self.names, rest, strict=True)))
