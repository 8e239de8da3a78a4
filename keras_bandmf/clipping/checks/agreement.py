"""Compares book-keeping with gradients of one example at a time, on synthetic rows."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._keras_internals import all_layers
from keras_bandmf.clipping.checks.snapshot import Snapshot
from keras_bandmf.clipping.clipper import Clipper
from keras_bandmf.clipping.coordinates import released
from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.losses import BatchLoss
from keras_bandmf.clipping.modes import ClippingMode
from keras_bandmf.clipping.paths.book_keeping import clip_by_book_keeping, forward
from keras_bandmf.clipping.row_losses import per_example_losses
from keras_bandmf.clipping.shapes import on_tensors, over_rows

# The attributes of layers that hold the number of rows of a table.
_TABLE_SIZES = ("input_dim", "vocabulary_size", "num_tokens")


def disagreement(
    model: keras.Model,
    x: Any,
    y: Any,
    sample_weight: Any,
    loss: BatchLoss,
    snapshot: Snapshot,
    mode: ClippingMode,
) -> str | None:
    """Returns where book-keeping and gradients of one example at a time differ, or None.

    Args:
        model: A built model, which takes the book-keeping path as far as its structure tells.
        x: Three rows. Only structure, shapes and dtypes are used, here and below.
        y: The targets, or None.
        sample_weight: The weights, or None.
        loss: A loss from `batch_loss`.
        snapshot: A snapshot that is restored before each pass, so that both draw the same masks.
        mode: The clipping mode.

    Formal guarantees: the result depends on the model and on the shapes and dtypes of the data, not
    on its values: rows drawn here at random take their place. Where the model does not take such
    rows, there is nothing to compare, and the structure of the model alone decides.
    """
    if not model.trainable_variables:
        return None
    parts = synthetic_rows(model, x, y, sample_weight)
    if parts is None:
        return None
    x, y, sample_weight = parts
    try:
        expected = _one_by_one(model, x, y, sample_weight, loss, snapshot)
    except tf.errors.OpError:  # values that a layer or the loss does not accept
        return None
    return _difference(model, (x, y, sample_weight), loss, snapshot, mode, expected)


def synthetic_rows(model: keras.Model, x: Any, y: Any, sample_weight: Any) -> list[Any] | None:
    """Returns three random rows of the shapes and dtypes of the data; None for strings.

    Integers are below the size of every table that a layer of `model` looks up, or 0 and 1.
    """
    random = np.random.default_rng(0)
    sizes = [
        getattr(layer, name)
        for layer in all_layers(model)
        for name in _TABLE_SIZES
        if isinstance(getattr(layer, name, None), int)
    ]
    below = max(1, min(sizes, default=2))

    def draw(t: tf.Tensor, kind: str) -> tf.Tensor:
        shape = (3, *t.shape[1:])
        values: np.ndarray
        if t.dtype.is_floating and kind == "x":
            values = random.normal(size=shape)
        elif t.dtype.is_floating:
            values = random.uniform(0.25, 1.0, size=shape)
        else:
            values = random.integers(0, below if kind == "x" else 2, size=shape)
        return tf.cast(tf.constant(values), t.dtype)

    named = (("x", x), ("y", y), ("sample_weight", sample_weight))
    leaves = [t for t in keras.tree.flatten((x, y, sample_weight)) if t is not None]
    if any(t.dtype == tf.string for t in leaves):
        return None
    return [on_tensors(functools.partial(draw, kind=kind), part) for kind, part in named]


def _difference(
    model: keras.Model,
    data: tuple[Any, Any, Any],
    loss: BatchLoss,
    snapshot: Snapshot,
    mode: ClippingMode,
    expected: list[np.ndarray],
) -> str | None:
    rows = [np.reshape(g, [3, -1]) for g in expected]
    squared = [np.einsum("ij,ij->i", g, g) for g in rows]
    norms = np.sqrt(np.sum(squared, axis=0))
    finite = np.isfinite(norms)
    clip = float(np.median(norms[finite])) if finite.any() and norms[finite].any() else 1.0

    snapshot.restore()
    mask = tf.constant([True] * 3)
    clipper = Clipper.of(model, clip, mode)
    x, y, sample_weight = data
    try:
        got = clip_by_book_keeping(model, x, y, sample_weight, mask, clipper, loss)
    except Unsupported as reason:
        return str(reason)
    narrow = any(layer.compute_dtype == "bfloat16" for layer in all_layers(model))
    tolerance = 5e-2 if narrow else 1e-3
    scale = max(float(np.max(norms[finite], initial=0.0)), 1e-30)
    difference = np.abs(np.asarray(got.norms)[finite] - norms[finite])
    if not np.all(difference <= tolerance * scale):
        return "book-keeping norms disagree with those of one example at a time"
    weights = clipper.factors([tf.constant(s) for s in squared], mask).weights
    factors = [np.asarray(w) for w in weights]
    for variable, group, g, total in zip(
        model.trainable_variables, clipper.groups, expected, got.sums, strict=True
    ):
        kept = np.where(finite.reshape([-1] + [1] * (g.ndim - 1)), g, 0)
        if not np.allclose(
            np.tensordot(factors[group], kept, 1), np.asarray(total), rtol=0, atol=tolerance * clip
        ):
            return f"book-keeping disagrees with one example at a time on {variable.path}"
    return None


def _one_by_one(
    model: keras.Model, x: Any, y: Any, sample_weight: Any, loss: BatchLoss, snapshot: Snapshot
) -> list[np.ndarray]:
    """Returns released gradients of the three examples, each from a forward pass of its own.

    The pass of a row has it in all three places, so that at its own it has the same dropout masks
    as in the batch, and another row nowhere.
    """
    variables = model.trainable_variables
    values = [v.value for v in variables]

    def gradients(i: tf.Tensor) -> list[tf.Tensor]:
        places = tf.fill([3], i)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            y_pred = forward(model, on_tensors(functools.partial(tf.gather, indices=places), x))
        _, outputs, slopes = per_example_losses(loss, y, y_pred, sample_weight)
        own = [tf.where(over_rows(tf.range(3) == i, s), s, tf.zeros_like(s)) for s in slopes]
        return tape.gradient(
            outputs,
            values,
            output_gradients=own,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )

    # A graph, because eager calls would trace the losses anew for each row.
    traced = tf.function(gradients, autograph=False)
    of_row = traced.get_concrete_function(tf.TensorSpec([], tf.int32))
    found = []
    for i in range(3):
        snapshot.restore()
        found.append(of_row(tf.constant(i)))
    return [
        np.stack(
            [np.asarray(released(v, tf.cast(tf.convert_to_tensor(g), tf.float64))) for g in column]
        )
        for v, column in zip(variables, zip(*found, strict=True), strict=True)
    ]
