"""`check_model`: does every example have a gradient of its own, and is it the one we compute?"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf.clipping.book_keeping import clip_by_book_keeping, forward
from keras_bandmf.clipping.clipper import Clipper
from keras_bandmf.clipping.coordinates import released
from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.locate import first_mixing_layer
from keras_bandmf.clipping.losses import (
    BatchLoss,
    batch_loss,
    build_loss,
    overrides_compute_loss,
)
from keras_bandmf.clipping.modes import ClippingMode, checked_mode
from keras_bandmf.clipping.passes import refuse_untraceable, traced_pass
from keras_bandmf.clipping.refusals import refuse_arguments, refuse_model, refuse_short_products
from keras_bandmf.clipping.routes import store_checked, structural_reason, trial_reason
from keras_bandmf.clipping.row_losses import per_example_losses
from keras_bandmf.clipping.rows import each_row_repeated, three_rows
from keras_bandmf.clipping.shapes import over_rows
from keras_bandmf.clipping.snapshot import Snapshot


def check_model(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    loss: Any = None,
    clipping: str | ClippingMode = "flat",
) -> None:
    """Test on up to three examples that the model can be trained privately, before it is.

    Runs eagerly and puts every variable back. In order: forward pass and loss may write no variable
    but metrics, may not depend on metrics, and must draw random numbers from seed generators, all
    of it read off their graphs; other rows must not change an example's outputs; the loss must
    be a sum over examples; and the book-keeping path must give what one-example-at-a-time gradients
    give. A model that fails only the last goes the general path from here on (`explain` says why).

    Args:
        model: a Keras model, compiled unless `loss` is given.
        x: inputs, at least one row; the first three are used. `y`, `sample_weight` likewise.
        y: targets or None.
        sample_weight: weights or None.
        loss: as for `clipped_gradients`.
        clipping: likewise.

    Raises:
        ValueError: the model, its loss or the mode is refused; the error names the layer, the
            variable or the loss, and what to use instead.

    Formal guarantees: a test on a sample, not a proof. A layer that mixes examples for some inputs
    only, or by less than rounding, can pass it. What is read off graphs is found on any sample;
    `captures.Watch` says what is out of sight.
    """
    refuse_arguments(x, y, sample_weight, 1.0, None)
    refuse_short_products()
    mode = checked_mode(clipping)
    refuse_model(model, sample_weight, loss)
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
        build_loss(model, x, y)
        row_loss = batch_loss(model, loss)
        snapshot.restore()
        _check_loss_captures(model, row_loss, x, y, forward(model, x), sample_weight)
        snapshot.restore()
        _check_loss(row_loss, x, y, forward(model, x), sample_weight)
        general = structural_reason(model, loss) or trial_reason(model, x, y, sample_weight, loss)
        if general is None:
            general = _disagreement(model, x, y, sample_weight, row_loss, snapshot, mode)
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
    wide = a.dtype == tf.float64
    narrow = a.dtype in (tf.bfloat16, tf.float16)
    a, b = (np.asarray(tf.cast(t[i], tf.float64)) for t in (a, b))
    scale = np.max(np.abs(np.where(np.isfinite(a), a, 0)), initial=0.0)
    tolerance = (1e-10 if wide else 1e-2 if narrow else 1e-5) * scale
    return bool(np.allclose(a, b, rtol=0, atol=tolerance + 1e-30, equal_nan=True))


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


def _disagreement(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any,
    loss: BatchLoss,
    snapshot: Snapshot,
    mode: ClippingMode,
) -> str | None:
    """Compare book-keeping with gradients of one example at a time; what differs, or None."""
    variables = model.trainable_variables
    if not variables:
        return None
    snapshot.restore()
    expected = _one_by_one(model, x, y, sample_weight, loss)
    flat = np.concatenate([np.reshape(g, [3, -1]) for g in expected], axis=1)
    norms = np.linalg.norm(flat, axis=1)
    finite = np.isfinite(norms)
    clip = float(np.median(norms[finite])) if finite.any() and norms[finite].any() else 1.0

    snapshot.restore()
    mask = tf.constant([True] * 3)
    clipper = Clipper.of(model, clip, mode)
    try:
        got = clip_by_book_keeping(model, x, y, sample_weight, mask, clipper, loss)
    except Unsupported as reason:
        return str(reason)
    narrow = any(layer.compute_dtype == "bfloat16" for layer in model._flatten_layers())
    tolerance = 5e-2 if narrow else 1e-3
    scale = max(float(np.max(norms[finite], initial=0.0)), 1e-30)
    difference = np.abs(np.asarray(got.norms)[finite] - norms[finite])
    if not np.all(difference <= tolerance * scale):
        return "book-keeping norms disagree with those of one example at a time"
    squared = [tf.constant(np.sum(np.reshape(g, [3, -1]) ** 2, axis=1)) for g in expected]
    factors = [np.asarray(weights) for weights in clipper.factors(squared, mask).weights]
    for variable, group, g, total in zip(
        variables, clipper.groups, expected, got.sums, strict=True
    ):
        kept = np.where(finite.reshape([-1] + [1] * (g.ndim - 1)), g, 0)
        if not np.allclose(
            np.tensordot(factors[group], kept, 1), np.asarray(total), rtol=0, atol=tolerance * clip
        ):
            return f"book-keeping disagrees with one example at a time on {variable.path}"
    return None


def _one_by_one(
    model: keras.Model, x: Any, y: Any, sample_weight: Any, loss: BatchLoss
) -> list[np.ndarray]:
    """Released gradients of the three examples, from one forward pass (same dropout)."""
    variables = model.trainable_variables
    values = [v.value for v in variables]
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(values)
        y_pred = forward(model, x)
    _, outputs, slopes = per_example_losses(loss, y, y_pred, sample_weight)
    found = []
    for i in range(3):
        own = [tf.where(over_rows(tf.range(3) == i, s), s, tf.zeros_like(s)) for s in slopes]
        found.append(
            tape.gradient(
                outputs,
                values,
                output_gradients=own,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        )
    return [
        np.stack(
            [np.asarray(released(v, tf.cast(tf.convert_to_tensor(g), tf.float64))) for g in column]
        )
        for v, column in zip(variables, zip(*found, strict=True), strict=True)
    ]
