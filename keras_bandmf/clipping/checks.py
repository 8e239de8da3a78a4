"""`check_model`: does every example have a gradient of its own, and is it the one we compute?"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf.clipping.agreement import disagreement
from keras_bandmf.clipping.book_keeping import forward
from keras_bandmf.clipping.declared_checks import check_declared, same_columns
from keras_bandmf.clipping.locate import first_mixing_layer
from keras_bandmf.clipping.loss_checks import check_loss
from keras_bandmf.clipping.losses import (
    BatchLoss,
    batch_loss,
    build_loss,
    overrides_compute_loss,
    with_ignored_class,
)
from keras_bandmf.clipping.modes import ClippingMode, checked_mode
from keras_bandmf.clipping.passes import refuse_untraceable, traced_pass
from keras_bandmf.clipping.refusals import refuse_arguments, refuse_model, refuse_short_products
from keras_bandmf.clipping.routes import store_checked, structural_reason, trial_reason
from keras_bandmf.clipping.row_losses import per_example_losses
from keras_bandmf.clipping.rows import all_rows, each_row_repeated, three_rows
from keras_bandmf.clipping.rowwise import rowwise
from keras_bandmf.clipping.snapshot import Snapshot


def check_model(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    loss: Any = None,
    clipping: str | ClippingMode = "flat",
) -> None:
    """Test that the model can be trained privately, before it is.

    Runs eagerly and puts every variable back. In order: forward pass and loss may write no variable
    but metrics, may not depend on metrics, and must draw random numbers from seed generators, all
    of it read off their graphs; other rows must not change an example's outputs, of three rows;
    where layers were declared row-wise, other rows must not change an example's outputs in a whole
    batch, with many random states; the loss must be a sum or mean over examples; and the
    book-keeping path must give what one-example-at-a-time gradients give on rows of random numbers.
    A model that fails only the last goes the general path from here on (`explain` says why).

    Args:
        model: a Keras model, compiled unless `loss` is given.
        x: inputs, at least one row; best as many as a batch of the run has. `y`, `sample_weight`
            likewise.
        y: targets or None.
        sample_weight: weights or None.
        loss: as for `clipped_gradients`.
        clipping: likewise.

    Raises:
        ValueError: the model, its loss or the mode is refused; the error names the layer, the
            variable or the loss, and what to use instead.

    Formal guarantees: a test on a sample, not a proof: mixing for some inputs only, or by less than
    rounding, can pass it. Privacy does not rest on it unless layers were declared row-wise: the
    path is chosen by structure (`rowwise`), and no value of the data takes part in that choice. The
    data given can only lead to an error. What is read off graphs is found on any sample;
    `captures.Watch` says what is out of sight.
    """
    refuse_arguments(x, y, sample_weight, 1.0, None)
    refuse_short_products()
    mode = checked_mode(clipping)
    refuse_model(model, sample_weight, loss)
    whole = all_rows(x, y, sample_weight)
    x, y, sample_weight = three_rows(x, y, sample_weight)
    if not model.built:
        forward(model, x)
    mode.variable_groups(model)
    snapshot = Snapshot(model, lambda: forward(model, x))
    try:
        y_pred = forward(model, x)
        if snapshot.untraceable is not None:
            refuse_untraceable("The forward pass", snapshot.untraceable)
        _check_written(snapshot)
        _check_rows(model, x, y_pred, snapshot)
        general = structural_reason(model, loss)
        declared = rowwise(model).declared
        if general is None and declared:
            check_declared(model, whole[0], declared, snapshot)
        build_loss(model, x, y)
        row_loss = batch_loss(model, loss)
        snapshot.restore()
        _check_loss_captures(model, row_loss, x, y, forward(model, x), sample_weight)
        snapshot.restore()
        _check_loss(row_loss, x, y, forward(model, x), sample_weight)
        # A loss of `compute_loss` may look at x; one that ignores a class divides by the others.
        if not (loss is None and overrides_compute_loss(model)):
            if not with_ignored_class(model, loss):
                check_loss(row_loss, whole[1], y_pred, whole[2])
        general = general or trial_reason(model, x, y, sample_weight, loss)
        if general is None:
            general = disagreement(model, x, y, sample_weight, row_loss, snapshot, mode)
    finally:
        snapshot.restore()
    store_checked(model, general)


def _check_written(snapshot: Snapshot) -> None:
    written = snapshot.written()
    if written:
        raise ValueError(
            "A training forward pass may write no variable but seed generators and metrics: what "
            "it writes would carry data past the noise. Remove the update (running statistics: use "
            f"GroupNormalization or LayerNormalization). Received: writes to {', '.join(written)}"
        )


def _check_rows(model: keras.Model, x: Any, y_pred: Any, snapshot: Snapshot) -> None:
    """Changing row j must not change the output of row i."""
    for leaf in keras.tree.flatten(y_pred):
        if not leaf.shape.rank or leaf.shape[0] != 3:
            raise ValueError(
                "Axis 0 of every output must be the example, as it is of the inputs: the model is "
                "time-major, folds the batch axis, or reduces over it. "
                f"Received: an output of shape {tuple(leaf.shape)} for 3 examples"
            )
    for i, changed in enumerate(each_row_repeated(x)):
        snapshot.restore()
        other = forward(model, changed)
        if all(
            same_row(a, b, i)
            for a, b in zip(keras.tree.flatten(y_pred), keras.tree.flatten(other), strict=True)
        ):
            continue
        where, instead = first_mixing_layer(model, x, changed, i, snapshot, same_row)
        raise ValueError(
            "An example must not change the output of another: its gradient would not be its own, "
            f"and clipping would bound nothing. {instead} Received: {where} mixes examples"
        )


def same_row(a: tf.Tensor, b: tf.Tensor, i: int) -> bool:
    """Whether row i of two tensors agrees up to rounding (NaN equals NaN)."""
    narrow, wide = a.dtype in (tf.bfloat16, tf.float16), a.dtype == tf.float64
    a, b = (np.asarray(tf.cast(t[i : i + 1], tf.float64)) for t in (a, b))
    return same_columns(a, b, narrow, wide)


def _check_loss_captures(
    model: keras.Model, loss: BatchLoss, x: Any, y: Any, y_pred: Any, sample_weight: Any
) -> None:
    """The loss keeps nothing from one step to another."""

    def run() -> tf.Tensor:
        if overrides_compute_loss(model):
            return loss(x, y, y_pred, sample_weight)
        return per_example_losses(loss, y, y_pred, sample_weight).losses

    error = traced_pass(run, model)
    if isinstance(error, Exception):
        refuse_untraceable("The loss", error)


def _check_loss(loss: BatchLoss, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> None:
    """The batch's loss must be a sum over examples, each on its own output only."""

    def slopes(outputs: Any) -> list[tf.Tensor]:
        leaves = [t for t in keras.tree.flatten(outputs) if t.dtype.is_floating]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(leaves)
            value = loss(x, y, outputs, sample_weight)
        return tape.gradient(value, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    # Without the logits Keras keeps beside an output: they would not change with it.
    y_pred = keras.tree.map_structure(_alone, y_pred)
    before = slopes(y_pred)
    for i, changed in enumerate(each_row_repeated(y_pred)):
        for a, b in zip(before, slopes(changed), strict=True):
            if not same_row(a, b, i):
                raise ValueError(
                    "The loss must be a sum over examples: here the output of one example changes "
                    "the gradient of another. In-batch losses are refused; for Dice and Tversky "
                    "pass `axis` so that axis 0 is left (for images axis=(1, 2, 3)). "
                    f"Received: a loss that couples example {i} with the others"
                )


def _alone(output: tf.Tensor) -> tf.Tensor:
    copy = tf.identity(output)
    mask = getattr(output, "_keras_mask", None)
    if mask is not None:
        copy._keras_mask = mask
    return copy
