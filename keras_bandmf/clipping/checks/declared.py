"""Tests models with layers that were declared row-wise, on many rows and random states."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import PrivacyError
from keras_bandmf.clipping.checks.snapshot import Snapshot
from keras_bandmf.clipping.checks.unseen import UnseenForward
from keras_bandmf.clipping.shapes import on_tensors, over_rows

_TRIES = 20
# Fewer rows than this are repeated, and then perturbed.
_LEAST_ROWS = 64
# The number of a try that puts rows in another order and leaves them as they are.
_REAL_ROWS = 0


def check_declared(model: keras.Model, x: Any, declared: list[str], snapshot: Snapshot) -> None:
    """Replaces half of the rows of a batch, again and again, and compares the other half.

    Each try draws the random state, the rows that stay, and the data, floats and integers, anew. It
    runs as a graph of that number of rows, and as one in which their number is not known.

    Args:
        model: A built model.
        x: The inputs, tensors: all rows there are, up to the size of a batch of the run.
        declared: The paths of the declared layers, for the error.
        snapshot: A snapshot of the model.

    Raises:
        PrivacyError: If a row's output changed.

    Formal guarantees: a test on a sample. Mixing with probability p in a batch that shows in the
    outputs, whether the number of rows is known or not, passes with probability at most
    (1 - p)^20; what the outputs do not show passes.
    """
    # Not secret: it decides what is tried, and nothing that is released.
    random = np.random.default_rng(0)
    rows = max(_LEAST_ROWS, int(keras.tree.flatten(x)[0].shape[0]))
    x = on_tensors(lambda t: tf.gather(t, np.arange(rows) % int(t.shape[0])), x)
    ways = (UnseenForward(model, x, known=True), UnseenForward(model, x))
    for attempt in range(_TRIES):
        base = x if attempt == 0 else _varied(x, attempt, random)
        other = _varied(x, attempt + 1, random)
        kept = random.uniform(size=rows) < 0.5
        kept[attempt % rows] = True
        seed = int(random.integers(2**31))
        try:
            outputs = _both(ways, base, other, kept, snapshot, seed)
        except tf.errors.OpError:  # rows that are made up, which a look-up may not accept
            outputs = _both(ways, x, _varied(x, _REAL_ROWS, random), kept, snapshot, seed)
        for a, b in zip(*outputs, strict=True):
            if not same_columns(a[kept], b[kept]):
                raise PrivacyError(
                    "A layer or model that was declared row-wise changes the output of an example "
                    "when others change: its gradient would not be its own, and clipping would "
                    "bound nothing. Take the declaration back (`clipping.declare_row_wise`, or a "
                    "clipping rule), and the model is trained one example at a time. "
                    f"Received: declared layers {', '.join(sorted(set(declared)))}"
                )


def same_columns(a: np.ndarray, b: np.ndarray, narrow: bool = False, wide: bool = False) -> bool:
    """Returns whether two tensors of rows agree up to rounding, column by column (NaN equals NaN).

    A large column must not hide another: each has a tolerance of its own.
    """
    if a.shape != b.shape:
        return False
    a, b = (np.reshape(t, [len(t), -1]) for t in (a, b))
    sizes = np.max(np.abs(np.where(np.isfinite(a), a, 0)), axis=0, initial=0.0)
    relative = 1e-10 if wide else 1e-2 if narrow else 1e-5
    tolerance = relative * sizes + 1e-4 * relative * np.max(sizes, initial=0.0) + 1e-30
    with np.errstate(invalid="ignore"):
        close = np.abs(a - b) <= tolerance
    return bool(np.all(close | (a == b) | (np.isnan(a) & np.isnan(b))))


def _both(
    ways: tuple[UnseenForward, ...],
    base: Any,
    other: Any,
    kept: np.ndarray,
    snapshot: Snapshot,
    seed: int,
) -> list[list[np.ndarray]]:
    """Returns all outputs of `base`, and those where rows that are not kept are of `other`."""
    changed = keras.tree.map_structure(
        lambda a, b: None if a is None else tf.where(over_rows(kept, a), a, b), base, other
    )
    return [
        [t for way in ways for t in _run(way, data, snapshot, seed)] for data in (base, changed)
    ]


def _run(way: UnseenForward, x: Any, snapshot: Snapshot, seed: int) -> list[np.ndarray]:
    snapshot.restore()
    snapshot.reseed(seed)
    leaves = keras.tree.flatten(way(x))
    return [np.asarray(tf.cast(t, tf.float64)) for t in leaves if t.dtype != tf.string]


def _varied(x: Any, attempt: int, random: np.random.Generator) -> Any:
    """Returns other rows of the kind: in another order, and perturbed where that makes sense."""
    return on_tensors(lambda t: _varied_leaf(t, attempt, random), x)


def _varied_leaf(t: tf.Tensor, attempt: int, random: np.random.Generator) -> tf.Tensor:
    values = tf.gather(t, random.permutation(int(t.shape[0])))
    if t.dtype == tf.string or t.dtype == tf.bool or attempt % 3 == _REAL_ROWS:
        return values
    if t.dtype.is_floating:
        noise = tf.constant(random.normal(size=t.shape))
        scale = (0.1, 1.0, 10.0)[attempt // 3 % 3]
        spread = tf.math.reduce_std(tf.cast(t, tf.float64), axis=0) + 1e-3
        return values + tf.cast(scale * spread * noise, t.dtype)
    array = np.asarray(t)
    # Column by column, because each column of integers has its own table.
    low, high = array.min(axis=0), array.max(axis=0)
    return tf.cast(tf.constant(random.integers(low, high, array.shape, endpoint=True)), t.dtype)
