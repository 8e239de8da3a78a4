"""Compares the loss of a batch with the losses of its examples: their sum, or another objective?"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf.clipping.checks.unseen import unseen
from keras_bandmf.clipping.losses import BatchLoss
from keras_bandmf.clipping.row_losses import per_example_losses
from keras_bandmf.clipping.shapes import on_tensors

_TRIES = 6
_LEAST_ROWS, _MOST_ROWS = 8, 256
_TOLERANCE = 1e-3


def check_loss(loss: BatchLoss, y: Any, y_pred: Any, sample_weight: Any) -> None:
    """Compares the batch's loss with those of its rows: outputs, targets and weights vary.

    Training always takes the loss of one row at a time, so that rows cannot be coupled. This is to
    tell a user whose loss means something else on a batch: it would train another objective.

    Formal guarantees: none; privacy does not rest on it. It is a test on invented outputs, and some
    objectives that differ pass in silence. Keras masks are dropped before: a masked loss is
    divided by the places of its own row that count, and not by those of the batch. `check_model`
    does not call it for a loss that ignores a class, of which the same holds, nor for a model that
    overrides `compute_loss`, where the loss of a batch of one row is what is trained.

    Args:
        loss: A loss from `batch_loss`. It must not read x.
        y: The targets of a whole batch, tensors, or None.
        y_pred: Outputs for some rows. Only their kind is used: random ones take their place.
        sample_weight: The weights, or None.

    Raises:
        ValueError: If the slopes of the batch's loss are neither the rows' own nor, for a mean over
            the batch, these over the number of rows.
    """
    outputs = keras.tree.flatten(y_pred)
    if not any(t.dtype.is_floating for t in outputs):
        return
    targets = [t for t in keras.tree.flatten((y, sample_weight)) if t is not None]
    count = max(int(t.shape[0]) for t in [*outputs, *targets])
    rows = np.arange(min(max(count, _LEAST_ROWS), _MOST_ROWS))
    y, y_pred, sample_weight = (
        on_tensors(lambda t: tf.gather(t, rows % int(t.shape[0])), part)
        for part in (y, y_pred, sample_weight)
    )
    # Gradients by bfloat16 outputs have three digits, which are too few to compare.
    y_pred = on_tensors(_wide, y_pred)
    compare = unseen(lambda *parts: _slopes(loss, *parts), y, y_pred, sample_weight)
    for parts in _batches(y, y_pred, sample_weight):
        try:
            pairs = compare(*parts)
        except tf.errors.OpError:  # values that the loss does not accept: no evidence
            continue
        for batch, own in pairs:
            _compare(np.asarray(batch, "float64"), np.asarray(own, "float64"))


def _wide(output: tf.Tensor) -> tf.Tensor:
    narrow = output.dtype in (tf.bfloat16, tf.float16)
    return tf.cast(output, tf.float32) if narrow else output


def _slopes(loss: BatchLoss, y: Any, y_pred: Any, sample_weight: Any) -> list[tuple]:
    """Returns the gradients by each output: of the batch's loss, and of the losses of its rows."""
    y_pred = keras.tree.map_structure(tf.identity, y_pred)
    leaves = [t for t in keras.tree.flatten(y_pred) if t.dtype.is_floating]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(leaves)
        value = loss(None, y, y_pred, sample_weight)
    whole = tape.gradient(value, leaves, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    _, outputs, slopes = per_example_losses(loss, y, y_pred, sample_weight)
    found = {id(t): slope for t, slope in zip(outputs, slopes, strict=True)}
    return [
        (tf.cast(w, tf.float64), tf.cast(found.get(id(t), tf.zeros_like(t)), tf.float64))
        for t, w in zip(leaves, whole, strict=True)
    ]


def _compare(batch: np.ndarray, own: np.ndarray) -> None:
    known = np.isfinite(batch) & np.isfinite(own)
    batch, own = np.where(known, batch, 0), np.where(known, own, 0)
    size = np.max(np.abs(batch), initial=0.0)
    rows = len(batch)
    errors = {c: np.max(np.abs(batch - c * own), initial=0.0) for c in (1.0, 1.0 / rows)}
    largest = max(size, np.max(np.abs(own), initial=0.0) / rows)
    if min(errors.values()) <= _TOLERANCE * largest + 1e-12:
        return
    raise ValueError(
        "The loss must be a sum over examples, or their mean: training takes the loss of each "
        "example by itself, and for this loss that is another objective than the batch's own. "
        "In-batch losses (triplet, circle, contrastive) and losses weighted by the labels of the "
        "batch are refused; give class weights to `plan.batches(..., class_weight=)`. For Dice and "
        "Tversky pass `axis` so that axis 0 is left (for images axis=(1, 2, 3)). "
        f"Received: a loss whose slopes on a batch of {rows} differ from those of its rows by "
        f"{min(errors.values()) / largest:.2g} of the largest"
    )


def _batches(y: Any, y_pred: Any, sample_weight: Any) -> Iterator[tuple]:
    """Yields random outputs with targets in another order, repeated or, at last, invented."""
    random = np.random.default_rng(0)
    rows = int(keras.tree.flatten(y_pred)[0].shape[0])
    for attempt in range(_TRIES):
        chosen = random.permutation(rows)
        if attempt % 3 == 1:  # three quarters share a target
            chosen[: 3 * rows // 4] = chosen[0]
        elif attempt % 3 == 2:  # pairs
            chosen = chosen[np.arange(rows) // 2]
        targets = on_tensors(functools.partial(tf.gather, indices=chosen), y)
        if attempt == _TRIES - 1:
            targets = on_tensors(lambda t: _zero_or_one(t, random), targets)
        scale = (1.0, 0.1, 3.0)[attempt // 2]
        outputs = keras.tree.map_structure(
            lambda t, scale=scale: _random_like(t, scale, random), y_pred
        )
        order = random.permutation(rows)
        weights = on_tensors(functools.partial(tf.gather, indices=order), sample_weight)
        yield targets, outputs, weights


def _random_like(t: tf.Tensor, scale: float, random: np.random.Generator) -> tf.Tensor:
    """Returns random outputs of the kind of `t`: distributions, probabilities, sizes, numbers."""
    if not t.dtype.is_floating:
        return t
    values = np.asarray(tf.cast(t, tf.float64))
    drawn = scale * random.normal(size=values.shape)
    if np.all((values >= 0) & (values <= 1)):
        if values.ndim > 1 and np.allclose(values.sum(axis=-1), 1.0, atol=1e-2):
            drawn = np.exp(drawn) / np.exp(drawn).sum(axis=-1, keepdims=True)
        else:
            drawn = 1.0 / (1.0 + np.exp(-drawn))
    elif np.all(values >= 0):
        drawn = np.abs(drawn) + 0.1
    return tf.cast(tf.constant(drawn), t.dtype)


def _zero_or_one(t: tf.Tensor, random: np.random.Generator) -> tf.Tensor:
    """Returns the same target in every place of a row, or all zero: the labels 0 and 1."""
    shape = [int(t.shape[0])] + [1] * (t.shape.rank - 1)
    drawn = np.broadcast_to(random.integers(0, 2, size=shape), t.shape)
    return tf.cast(tf.constant(drawn), t.dtype) if t.dtype != tf.string else t
