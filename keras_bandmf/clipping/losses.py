"""The loss of each example: what Keras computes on a batch that holds that example alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

# The one class that resolves losses as `compile` does; Keras does not export it.
from keras.src.trainers.compile_utils import CompileLoss

from keras_bandmf.clipping.shapes import on_tensors

BatchLoss = Callable[[Any, Any, Any, Any], tf.Tensor]


def overrides_compute_loss(model: keras.Model) -> bool:
    """Whether `model` has a `compute_loss` of its own, on its class or on the instance."""
    return type(model).compute_loss is not keras.Model.compute_loss or "compute_loss" in vars(model)


def batch_loss(model: keras.Model, loss: Any = None) -> BatchLoss:
    """The function (x, y, y_pred, sample_weight) -> scalar that Keras would minimise.

    Without weight regularisers (they belong after the noise), without the factor 1 / replicas that
    Keras applies under a distribution strategy, and without touching a metric.

    Args:
        model: a compiled model, or any model if `loss` is given.
        loss: None for the compiled loss; else one loss for a model with one output.

    Raises:
        ValueError: no loss at all.
    """
    if loss is None and overrides_compute_loss(model):

        def compute(x: Any, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
            return model._compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )

        return _alone(compute)

    compiled = getattr(model, "_compile_loss", None) if loss is None else _compiled(loss)
    if compiled is None:
        raise ValueError(
            "Expected a compiled model, or `loss=`: there is no loss to differentiate. Call "
            f"`model.compile(optimizer, loss=...)` first or pass `loss=`. Received: loss={loss!r}"
        )
    alone = _alone(lambda x, y, y_pred, sample_weight: compiled(y, y_pred, sample_weight))

    def built(x: Any, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
        if loss is not None and len(keras.tree.flatten(y_pred)) > 1:
            raise ValueError(
                "`loss=` is for models with one output; use `compile(loss=...)` for several. "
                f"Received: {len(keras.tree.flatten(y_pred))} outputs"
            )
        if not compiled.built:
            _build(alone, y, y_pred)
        return alone(x, y, y_pred, sample_weight)

    return built


def per_example_losses(loss: BatchLoss, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
    """Loss of every example, shape (batch,).

    Each is `loss` on a batch of one row: sample weights, temporal weights, masks, several outputs
    and loss weights act as they do there.

    Args:
        loss: from `batch_loss`; it must not look at x.
        y: targets, a structure of tensors with the example on axis 0, or None.
        y_pred: outputs of the model on the whole batch.
        sample_weight: None, a tensor, or a structure of tensors.
    """
    parts = (y, y_pred, sample_weight)
    leaves = [_Leaf(leaf) for part in parts for leaf in keras.tree.flatten(part)]

    def one(rows: list[list[tf.Tensor]]) -> tf.Tensor:
        single = [leaf.of_row(row) for leaf, row in zip(leaves, rows, strict=True)]
        packed, start = [], 0
        for part in parts:
            count = len(keras.tree.flatten(part))
            packed.append(keras.tree.pack_sequence_as(part, single[start : start + count]))
            start += count
        return tf.cast(loss(None, *packed), keras.config.floatx())

    tensors = [leaf.tensors for leaf in leaves]
    try:
        return tf.vectorized_map(one, tensors)
    except Exception:  # an operation that cannot be vectorised, or a mistake: this shows which
        return tf.map_fn(one, tensors, fn_output_signature=keras.config.floatx())


class _Leaf:
    """A tensor and what Keras hangs on it and reads in losses: its mask and its logits."""

    def __init__(self, leaf: tf.Tensor | None):
        self.mask = getattr(leaf, "_keras_mask", None)
        self.logits = getattr(leaf, "_keras_logits", None)
        self.activation = None
        if leaf is not None and self.logits is None and not tf.executing_eagerly():
            # In a graph Keras looks for the operation that made the output and takes its input.
            self.activation = {"Softmax": tf.nn.softmax, "Sigmoid": tf.sigmoid}.get(
                getattr(getattr(leaf, "op", None), "type", None)
            )
            leaf = leaf if self.activation is None else leaf.op.inputs[0]
        parts = (leaf, self.mask, self.logits)
        self.tensors = [t for t in parts if t is not None]

    def of_row(self, rows: list[tf.Tensor]) -> tf.Tensor | None:
        """The same for a batch of one, from one row of each of `tensors`."""
        if not rows:
            return None
        rest = iter([tf.expand_dims(row, 0) for row in rows])
        leaf = next(rest)
        if self.activation is not None:
            leaf = self.activation(leaf)
        if self.mask is not None:
            leaf._keras_mask = next(rest)
        if self.logits is not None:
            leaf._keras_logits = next(rest)
        return leaf


def with_mean_by_weight(model: keras.Model, loss: Any = None) -> bool:
    """Whether any loss divides by the sum of the sample weights."""
    chosen = model.loss if loss is None else loss
    return any(
        getattr(leaf, "reduction", None) == "mean_with_sample_weight"
        for leaf in keras.tree.flatten(chosen)
    )


def _alone(compute: BatchLoss) -> BatchLoss:
    """`compute` with its side effects and its scaling for distribution taken away."""

    def alone(x: Any, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
        # Metrics inside the loss would count every example as a step: StatelessScope drops that.
        with _no_replicas(), keras.StatelessScope():
            value = compute(x, y, y_pred, sample_weight)
        return tf.reduce_sum(tf.convert_to_tensor(value))

    return alone


@contextlib.contextmanager
def _no_replicas():
    """Keras divides mean losses by the number of replicas it finds: let it find one."""
    if not tf.distribute.has_strategy():
        yield
        return
    with tf.Graph().as_default():
        default = tf.distribute.get_strategy()
    with tf.distribute.ReplicaContext(default, replica_id_in_sync_group=0):
        yield


def _compiled(loss: Any) -> CompileLoss:
    """`loss` as `compile` would resolve it, for a model with one output."""
    if keras.tree.is_nested(loss):
        raise ValueError(
            "`loss` must be one loss: a name, a `keras.losses.Loss` or a function "
            "(y_true, y_pred). For several outputs use `compile(loss=...)`. "
            f"Received: loss={loss!r}"
        )
    return CompileLoss(loss)


def _build(loss: BatchLoss, y: Any, y_pred: Any) -> None:
    """Let Keras make the metrics of single outputs, outside any graph."""

    def zeros(t: tf.Tensor) -> tf.Tensor:
        return tf.zeros([d or 1 for d in t.shape], t.dtype)

    with tf.init_scope():
        loss(None, on_tensors(zeros, y), on_tensors(zeros, y_pred), None)
