"""One example at a time with `tf.GradientTape` and nothing of the library: the definition."""

import keras
import numpy as np
import tensorflow as tf


def row(data, i):
    return keras.tree.map_structure(lambda t: None if t is None else t[i : i + 1], data)


def gradients(model, x, y, weight, loss=None):
    """Per-example gradients: list over variables of (rows, *shape) float64 arrays, and losses."""
    count = len(next(t for t in keras.tree.flatten(x)))
    found, losses = [], []
    for i in range(count):
        with tf.GradientTape() as tape:
            tape.watch([v.value for v in model.trainable_variables])
            y_pred = model(row(x, i), training=True)
            compute = loss or model._compile_loss
            value = tf.reduce_sum(compute(row(y, i), y_pred, row(weight, i)))
        g = tape.gradient(
            value,
            [v.value for v in model.trainable_variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        found.append([np.asarray(tf.cast(tf.convert_to_tensor(t), tf.float64)) for t in g])
        losses.append(float(value))
    return [np.stack(column) for column in zip(*found, strict=True)], np.array(losses)


def clipped(per_example, clip, mask=None):
    """Norms and clipped sums in dense NumPy; rows that are masked or not finite count as zero."""
    flat = np.concatenate([g.reshape(len(g), -1) for g in per_example], axis=1)
    norms = np.linalg.norm(flat, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.minimum(1, clip / norms)
    kept = np.isfinite(norms) & (True if mask is None else np.asarray(mask))
    factors = np.where(kept, factors, 0)
    sums = []
    for g in per_example:
        g = np.where(kept.reshape([-1] + [1] * (g.ndim - 1)), g, 0)
        sums.append(np.tensordot(factors, g, 1))
    return norms, sums


def error(sums, expected):
    """Largest difference, relative to the largest entry over all variables."""
    largest = max(np.max(np.abs(e)) for e in expected)
    worst = max(np.max(np.abs(np.asarray(s) - e)) for s, e in zip(sums, expected, strict=True))
    return worst / largest if largest else worst


def compare(clipped_gradients, model, x, y):
    """Norms and clipped sums of `clipped_gradients` are those of one example at a time.

    The clip norm is the median of the norms, so that about half of the rows are clipped.
    """
    per_example, _ = gradients(model, x, y, None)
    clip = float(np.median(clipped(per_example, 1.0)[0]))
    norms, sums = clipped(per_example, clip)
    found = clipped_gradients(model, x, y, l2_norm_clip=clip)
    assert error(found.sums, sums) < 1e-5
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
