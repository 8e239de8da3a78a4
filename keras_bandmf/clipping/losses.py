"""The loss of each example: what Keras computes on a batch that holds that example alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_bandmf._keras_internals import (
    compiled_loss,
    keras_mask,
    loss_of_training_step,
    resolved_loss,
    traced_symbolically,
)


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """The function (x, y, y_pred, sample_weight) -> scalar that Keras would minimize.

    Attributes:
        compute: The function.
        compiled: What `compile` made of the losses, if that is all that `compute` calls.
    """

    compute: Callable[[Any, Any, Any, Any], tf.Tensor]
    compiled: Any = None

    def __call__(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
        """Returns the loss of a batch, without side effects and scaling for distribution.

        Args:
            x: The inputs.
            y: The targets, or None.
            y_pred: The outputs.
            sample_weight: The weights, or None.
        """
        # Metrics inside the loss would count every example as a step: StatelessScope drops that.
        with no_replicas(), keras.StatelessScope():
            value = self.compute(x, y, y_pred, sample_weight)
        return tf.reduce_sum(tf.convert_to_tensor(value))


def overrides_compute_loss(model: keras.Model) -> bool:
    """Returns whether `model` has a `compute_loss` of its own, on its class or on the instance."""
    return type(model).compute_loss is not keras.Model.compute_loss or "compute_loss" in vars(model)


def batch_loss(model: keras.Model, loss: Any = None) -> BatchLoss:
    """Returns the loss that Keras would minimize.

    Without weight regularizers (they belong after the noise), without the factor 1 / replicas that
    Keras applies under a distribution, and without touching a metric.

    Args:
        model: A compiled model, or any model if `loss` is given.
        loss: None for the compiled loss; else one loss for a model with one output.

    Raises:
        ValueError: If there is no loss at all.
    """
    if loss is None and overrides_compute_loss(model):

        def compute(x: Any, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
            return loss_of_training_step(model, x, y, y_pred, sample_weight)

        return BatchLoss(compute)

    compiled = compiled_loss(model) if loss is None else _compiled(loss)
    if compiled is None:
        raise ValueError(
            "Expected a compiled model or `loss=`, because there is no loss to differentiate. Call "
            f"`model.compile(optimizer, loss=...)` first or pass `loss=`. Received: loss={loss!r}"
        )

    def call(x: Any, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
        if loss is not None and len(keras.tree.flatten(y_pred)) > 1:
            raise ValueError(
                "Expected one output with `loss=`. Use `compile(loss=...)` for several outputs. "
                f"Received: {len(keras.tree.flatten(y_pred))} outputs"
            )
        return compiled(y, y_pred, sample_weight)

    return BatchLoss(call, compiled)


def build_loss(model: keras.Model, x: Any, y: Any) -> None:
    """Makes Keras build the metrics of single outputs, as it does on the first use of the loss.

    Args:
        model: A built model.
        x: The inputs, tensors. Only shapes and dtypes matter, also of `y`.
        y: The targets, or None.

    Raises:
        ValueError: If several outputs are not built yet inside a graph, where no variable can be
            made.
    """
    compiled = compiled_loss(model)
    if compiled is None or compiled.built or overrides_compute_loss(model):
        return
    if tf.executing_eagerly():
        # Not on made-up rows, which a model need not accept.
        y_pred = traced_symbolically(model, x)
        traced_symbolically(compiled, y, y_pred)
    elif len(keras.tree.flatten(y)) > 1:
        raise ValueError(
            "The losses of several outputs are built on first use, which cannot happen inside a "
            "`tf.function`. Call `clipping.check_model(model, x, y)` before training. "
            f"Received: model '{model.name}' with {len(keras.tree.flatten(y))} targets"
        )


def with_mean_by_weight(model: keras.Model, loss: Any = None) -> bool:
    """Returns whether any loss divides by the sum of the sample weights."""
    chosen = model.loss if loss is None else loss
    return any(
        getattr(leaf, "reduction", None) == "mean_with_sample_weight"
        for leaf in keras.tree.flatten(chosen)
    )


def with_ignored_class(model: keras.Model, loss: Any = None) -> bool:
    """Returns whether any loss ignores a class, and so divides by the number of rows it keeps."""
    chosen = model.loss if loss is None else loss
    return any(
        getattr(leaf, "ignore_class", None) is not None for leaf in keras.tree.flatten(chosen)
    )


def is_mean_of_rows(model: keras.Model, outputs: Any) -> bool:
    """Returns whether the compiled loss of a batch is the mean of the losses of its rows.

    Args:
        model: A compiled model.
        outputs: What it returned, with what Keras attached: a mask makes rows count differently.

    Formal guarantees: False where that is not known: with several outputs, a mask, an ignored
        class, or a `compute_loss` or a reduction that is not Keras's default.
    """
    leaves = keras.tree.flatten(outputs)
    if overrides_compute_loss(model) or keras.tree.is_nested(model.loss) or len(leaves) != 1:
        return False
    reduction = getattr(model.loss, "reduction", "sum_over_batch_size")
    means = reduction in ("sum_over_batch_size", "mean")
    return means and keras_mask(leaves[0]) is None and not with_ignored_class(model)


@contextlib.contextmanager
def no_replicas() -> Iterator[None]:
    """Makes the code inside find one replica, as outside any distribution.

    Keras divides mean losses by the number of replicas it finds; a tape cannot watch a variable
    of several.
    """
    if not tf.distribute.has_strategy():
        yield
        return
    with tf.Graph().as_default():
        default = tf.distribute.get_strategy()
    with tf.distribute.ReplicaContext(default, replica_id_in_sync_group=0):
        yield


def _compiled(loss: Any) -> Callable[[Any, Any, Any], Any]:
    """Returns `loss` as `compile` would resolve it, for a model with one output."""
    if keras.tree.is_nested(loss):
        raise ValueError(
            "Expected `loss` to be one loss: a name, a `keras.losses.Loss` or a function "
            "(y_true, y_pred). For several outputs use `compile(loss=...)`. "
            f"Received: loss={loss!r}"
        )
    try:
        keras.losses.get(loss)
    except ValueError as error:
        raise ValueError(
            "Expected `loss` to be the name of a loss of Keras, a `keras.losses.Loss` or a "
            f"function (y_true, y_pred). Received: loss={loss!r}"
        ) from error
    return resolved_loss(loss)
