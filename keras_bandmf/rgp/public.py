"""Carriers from the gradients of public data: they are found before a run, and stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bandmf._checks import checked_int
from keras_bandmf._keras_internals import all_layers, own_weights
from keras_bandmf.clipping import clipped_gradients
from keras_bandmf.clipping.coordinates import coordinates_of
from keras_bandmf.rgp import algebra
from keras_bandmf.rgp.layouts import CarriedKernel

#: L (m, r) and R (r, n).
Pair = tuple[np.ndarray, np.ndarray]


def main_directions(
    model: keras.Model,
    batches: Iterable[Any],
    kernels: Sequence[CarriedKernel],
    rank: int,
    loss: Any = None,
    l2_norm_clip: float = 1.0,
    iterations: int = 4,
) -> list[Pair]:
    """Returns, for each kernel, the directions in which the gradients of batches are largest.

    With G the sum of the clipped gradients of a batch, as a matrix, L has the first r eigenvectors
    of the sum over batches of G G', and R those of G' G, both by subspace iteration.

    Args:
        model: A built model without carriers.
        batches: Pairs (x, y), which can be gone through several times.
        kernels: The kernels.
        rank: The rank r.
        loss: As in `clipped_gradients`.
        l2_norm_clip: The norm to which the gradient of each example is clipped.
        iterations: How many times the batches are gone through.

    Returns:
        L (m, r) with orthonormal columns and R (r, n) with orthonormal rows, for each kernel.

    Raises:
        ValueError: If the model has carriers or is distributed, there are no batches, or not as
            many in each pass, one is not (x, y), or no gradient reaches a kernel.
    """
    iterations = checked_int("iterations", iterations)
    for layer in all_layers(model):
        if any(coordinates_of(variable) is not None for variable in own_weights(layer)):
            raise ValueError(
                "Expected a model without carriers, whose gradients are whole. Call "
                "`merge_rgp(model)` first, or find the carriers before `enable_rgp`. "
                f"Received: a model whose layer '{layer.path}' has carriers"
            )
    if any(isinstance(v.value, tf.distribute.DistributedValues) for v in model.trainable_variables):
        raise ValueError(
            "Expected a model on one device. Find the carriers with a model that is made outside "
            "`Strategy.scope()`, and give them to `enable_rgp` inside. "
            f"Received: model '{model.name}', whose variables have a copy on each replica"
        )
    positions = {id(variable): i for i, variable in enumerate(model.trainable_variables)}
    rng = np.random.default_rng(0)  # any start will do
    sides = [side for kernel in kernels for side in kernel.layout.sides]
    bases = [
        tf.Variable(np.linalg.qr(rng.normal(size=(side, rank)))[0], dtype=tf.float32)
        for side in sides
    ]
    totals = [tf.Variable(tf.zeros((side, rank))) for side in sides]

    @tf.function(autograph=False, reduce_retracing=True)
    def add(x: Any, y: Any) -> None:
        found = clipped_gradients(model, x, y, loss=loss, l2_norm_clip=l2_norm_clip).sums
        for i, (variable, layout) in enumerate(kernels):
            matrix = layout.matrix(tf.cast(found[positions[id(variable)]], tf.float32))
            left, right = bases[2 * i], bases[2 * i + 1]
            thin = tf.matmul(matrix, left, transpose_a=True)
            totals[2 * i].assign_add(tf.matmul(matrix, thin))
            thin = tf.matmul(matrix, right)
            totals[2 * i + 1].assign_add(tf.matmul(matrix, thin, transpose_a=True))

    expected = None
    for _ in range(iterations):
        count = 0
        for batch in batches:
            add(*_checked_batch(batch))
            count += 1
        _check_count(count, expected)
        expected = count
        for i, (basis, total) in enumerate(zip(bases, totals, strict=True)):
            size = float(tf.norm(total))
            if not 0.0 < size < np.inf:
                raise ValueError(
                    "Expected gradients that are finite and reach every kernel. A head that starts "
                    "at zero passes none on: train it first, or start it at random. "
                    f"Received: gradients of '{kernels[i // 2].variable.path}' of size {size}"
                )
            basis.assign(algebra.orthonormal(total / size))
            total.assign(tf.zeros_like(total))
    found = [basis.numpy() for basis in bases]
    return [(left, right.T) for left, right in zip(found[::2], found[1::2], strict=True)]


def checked_carriers(carriers: Any, kernels: Sequence[CarriedKernel], rank: int) -> list[Pair]:
    """Returns carriers that were given, made orthonormal.

    Args:
        carriers: What was received as `carriers`.
        kernels: The kernels that are to get them.
        rank: The rank r.

    Raises:
        TypeError: If `carriers` is not a list.
        ValueError: If there is not one pair for each kernel, of its shape.
    """
    if not isinstance(carriers, Sequence) or isinstance(carriers, str):
        raise TypeError(
            "Expected `carriers` to be None or what `public_carriers` returns: a list of pairs "
            f"(L, R). Received: carriers of type {type(carriers).__name__}"
        )
    if len(carriers) != len(kernels):
        raise ValueError(
            "Expected `carriers` to have a pair for each kernel that gets carriers. Give "
            "`enable_rgp` the rank, `layers` and `exclude` that `public_carriers` had. "
            f"Received: {len(carriers)} pairs for {len(kernels)} kernels"
        )
    return [_checked_pair(*each, rank) for each in zip(carriers, kernels, strict=True)]


def _checked_pair(pair: Any, kernel: CarriedKernel, rank: int) -> Pair:
    """Returns the pair of one kernel, orthonormal in float64: clipping rests on it."""
    path, (m, n) = kernel.variable.path, kernel.layout.sides
    try:
        left, right = (np.asarray(each, np.float64) for each in pair)
    except (TypeError, ValueError):
        left = right = np.zeros(0)
    shapes = (left.shape, right.shape)
    fits = shapes == ((m, rank), (rank, n))
    if fits:
        left, right = np.linalg.qr(left)[0], np.linalg.qr(right.T)[0].T
    # Checked in the basis: that of finite numbers is not finite if they are too large.
    if not (fits and np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError(
            f"Expected the carriers of '{path}' to be a pair of finite arrays, of shapes "
            f"{(m, rank)} and {(rank, n)}. Received: shapes {shapes}, or numbers that are not "
            "finite"
        )
    return left, right


def _check_count(count: int, expected: int | None) -> None:
    if count == 0 or expected not in (None, count):
        raise ValueError(
            "Expected `batches` to have at least one batch, and the same number each time it is "
            "gone through. Give a tf.data.Dataset or a list, not a generator. "
            f"Received: {count} batches in one pass, {expected or 0} in the pass before"
        )


def _checked_batch(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise ValueError(
            "Expected `batches` to yield pairs (x, y). "
            f"Received: a batch of type {type(batch).__name__}"
        )
    return keras.tree.map_structure(tf.convert_to_tensor, batch)
