"""`check_model`: tests that every example has a gradient of its own, and that it is computed."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import PrivacyError
from keras_bandmf._keras_internals import keras_mask, set_keras_mask, traced_symbolically
from keras_bandmf.clipping.checks.agreement import disagreement
from keras_bandmf.clipping.checks.declared import check_declared, same_columns
from keras_bandmf.clipping.checks.losses import check_loss
from keras_bandmf.clipping.checks.mixing_layer import first_mixing_layer
from keras_bandmf.clipping.checks.probe import FEW, all_rows, each_row_repeated, few_rows
from keras_bandmf.clipping.checks.refusals import (
    refuse_model,
    refuse_short_products,
    refuse_sparse_data,
)
from keras_bandmf.clipping.checks.snapshot import Snapshot
from keras_bandmf.clipping.checks.unseen import UnseenForward, unseen
from keras_bandmf.clipping.losses import (
    BatchLoss,
    batch_loss,
    build_loss,
    overrides_compute_loss,
    with_ignored_class,
)
from keras_bandmf.clipping.modes import ClippingMode, ClippingName, checked_mode
from keras_bandmf.clipping.passes import refuse_untraceable, traced_pass, written_by_metrics
from keras_bandmf.clipping.paths.book_keeping import forward
from keras_bandmf.clipping.paths.routing import store_checked, structural_reason, trial_reason
from keras_bandmf.clipping.row_losses import per_example_losses
from keras_bandmf.clipping.rowwise.decision import rowwise


def check_model(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    loss: Any = None,
    clipping: ClippingName | ClippingMode = "flat",
) -> None:
    """Tests whether a model can be trained privately, before it is.

    The private `fit` calls it. It puts every variable back. In this order:

     1. Forward pass and loss may write no variable but metrics, may not depend on metrics, and must
        draw random numbers from seed generators. All of this is read off their graphs.
     2. Other rows must not change an example's outputs.
     3. Where layers were declared row-wise, other rows must not change an example's outputs in a
        whole batch, with many random states.
     4. The loss must be a sum or a mean over examples.
     5. The book-keeping path must give the gradients of one example at a time, on rows of random
        numbers.

    All but the first use moved weights, because zeros would hide what comes before them. A model
    that fails only the last takes the general path from here on (`explain` says why).

    Args:
        model: A Keras model, compiled unless `loss` is given.
        x: The inputs, at least one row; at best as many as a batch of the run has.
        y: The targets of the same rows, or None.
        sample_weight: The weights of the same rows, or None.
        loss: See `clipped_gradients`.
        clipping: See `clipped_gradients`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model, its loss or the mode is refused. The message names the layer, the
            variable or the loss, and what to use instead.

    Formal guarantees: a test on a sample, not a proof: mixing for some inputs only, or by less than
    rounding, can pass it. Privacy does not rest on it unless layers were declared row-wise: the
    path is chosen by structure (`rowwise`), and no value of the data takes part in that choice. The
    data given can only lead to an error. What is read off graphs is found on any sample;
    `captures.Watch` says what is out of sight. No Python code of the model or the loss gets to see
    a value of the data, which it could keep and make a constant of the graph and of the released
    model: on the data it runs as a graph alone (`unseen`), eagerly on random numbers.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> import keras_bandmf as bandmf
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        >>> try:
        ...     bandmf.clipping.check_model(model, np.ones((4, 3)), np.ones((4, 3)), loss="mse")
        ... except bandmf.PrivacyError as error:
        ...     print(str(error)[:52])
        BatchNormalization mixes the examples of a batch, so
    """
    refuse_sparse_data(x, y, sample_weight)
    refuse_short_products()
    mode = checked_mode(clipping)
    refuse_model(model, sample_weight, loss)
    whole = all_rows(x, y, sample_weight)
    x, y, sample_weight = few_rows(x, y, sample_weight)
    if not model.built:
        traced_symbolically(functools.partial(forward, model), x)
    mode.variable_groups(model)
    snapshot = Snapshot(model, x)
    try:
        if snapshot.untraceable is not None:
            refuse_untraceable("The forward pass", snapshot.untraceable)
        try:
            run = UnseenForward(model, x)
            y_pred = run(x)
        except tf.errors.OpError:
            raise
        except Exception as error:  # what the first trace left may not fit a second one
            refuse_untraceable("The forward pass", error)
        _check_written(snapshot)
        _check_rows(model, run, x, snapshot)
        build_loss(model, x, y)
        row_loss = batch_loss(model, loss)
        snapshot.randomize()
        _check_rows(model, run, x, snapshot)
        general = structural_reason(model, loss)
        declared = rowwise(model).declared
        if general is None and declared:
            check_declared(model, whole[0], declared, snapshot)
        snapshot.restore()
        unread = written_by_metrics(model, x, y, y_pred, sample_weight)
        _check_loss_captures(model, row_loss, x, y, sample_weight, unread)
        _check_loss(row_loss, x, y, run(x), sample_weight)
        # A loss of `compute_loss` may read x. One that ignores a class divides by the other rows.
        if not (loss is None and overrides_compute_loss(model)):
            if not with_ignored_class(model, loss):
                check_loss(row_loss, whole[1], y_pred, whole[2])
        general = general or trial_reason(model, x, y, sample_weight, loss)
        if general is None:
            general = disagreement(model, x, y, sample_weight, row_loss, snapshot, mode)
    finally:
        snapshot.put_back()
    store_checked(model, general)


def _check_written(snapshot: Snapshot) -> None:
    written = snapshot.written()
    if written:
        raise PrivacyError(
            "A training forward pass may write no variable but seed generators and metrics: what "
            "it writes would carry data past the noise. Remove the update (running statistics: use "
            "GroupNormalization or LayerNormalization; a recurrent state: `stateful=False`). "
            f"Received: writes to {', '.join(written)}"
        )


def _check_rows(model: keras.Model, run: UnseenForward, x: Any, snapshot: Snapshot) -> None:
    """Checks that changing the other rows does not change the output of a row.

    Real rows are used, because layers may accept no random ones (strings, category numbers).
    """
    snapshot.restore()
    y_pred = run(x)
    for leaf in keras.tree.flatten(y_pred):
        if not leaf.shape.rank or leaf.shape[0] != FEW:
            raise PrivacyError(
                "Axis 0 of every output must be the example, as it is of the inputs: the model is "
                "time-major, folds the batch axis, or reduces over it. "
                f"Received: an output of shape {tuple(leaf.shape)} for {FEW} examples"
            )
    for i, changed in each_row_repeated(x):
        snapshot.restore()
        try:
            other = run(changed)
        except tf.errors.OpError:  # where all rows are alike, others are made up: no evidence
            continue
        if all(
            same_row(a, b, i)
            for a, b in zip(keras.tree.flatten(y_pred), keras.tree.flatten(other), strict=True)
        ):
            continue
        where, instead = first_mixing_layer(model, x, changed, i, snapshot, same_row)
        raise PrivacyError(
            "An example must not change the output of another: its gradient would not be its own, "
            f"and clipping would bound nothing. {instead} Received: {where} mixes examples"
        )


def same_row(a: tf.Tensor, b: tf.Tensor, i: int) -> bool:
    """Returns whether row i of two tensors agrees up to rounding (NaN equals NaN)."""
    narrow, wide = a.dtype in (tf.bfloat16, tf.float16), a.dtype == tf.float64
    a, b = (np.asarray(tf.cast(t[i : i + 1], tf.float64)) for t in (a, b))
    return same_columns(a, b, narrow, wide)


def _check_loss_captures(
    model: keras.Model,
    loss: BatchLoss,
    x: Any,
    y: Any,
    sample_weight: Any,
    unread: dict[int, str],
) -> None:
    """Checks that the loss keeps nothing between steps and reads nothing that a metric keeps."""

    def run(x: Any, y: Any, sample_weight: Any) -> tf.Tensor:
        y_pred = forward(model, x)
        if overrides_compute_loss(model):
            return loss(x, y, y_pred, sample_weight)
        return per_example_losses(loss, y, y_pred, sample_weight).losses

    error = traced_pass(run, model, x, y, sample_weight, unread=unread)
    if isinstance(error, Exception):
        refuse_untraceable("The loss", error)


def _check_loss(loss: BatchLoss, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> None:
    """Checks that the batch's loss is a sum over examples, each on its own output only."""

    def slopes(outputs: Any, masks: list, x: Any, y: Any, sample_weight: Any) -> list[tf.Tensor]:
        for output, mask in zip(keras.tree.flatten(outputs), masks, strict=True):
            if mask is not None:
                set_keras_mask(output, mask)
        leaves = [t for t in keras.tree.flatten(outputs) if t.dtype.is_floating]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(leaves)
            value = loss(x, y, outputs, sample_weight)
        return tape.gradient(value, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    masks = [keras_mask(t) for t in keras.tree.flatten(y_pred)]
    rest = (masks, x, y, sample_weight)
    run = unseen(slopes, y_pred, *rest)
    before = run(y_pred, *rest)
    for i, changed in each_row_repeated(y_pred):
        for a, b in zip(before, run(changed, *rest), strict=True):
            if not same_row(a, b, i):
                raise PrivacyError(
                    "The loss must be a sum over examples: here the output of one example changes "
                    "the gradient of another. In-batch losses are refused; for Dice and Tversky "
                    "pass `axis` so that axis 0 is left (for images axis=(1, 2, 3)). "
                    f"Received: a loss that couples example {i} with the others"
                )
