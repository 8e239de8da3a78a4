"""Toeplitz strategies for workloads other than prefix sums: each column is worked with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from keras_bandmf.strategies.arguments import check_shape
from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from keras_bandmf.strategies.search.banded import normalize_columns, power_mean, stages
from keras_bandmf.strategies.search.lbfgs import descend
from keras_bandmf.strategies.search.scipy_lbfgs import Progress
from keras_bandmf.strategies.workload import Workload

_FIRST_STEP = 0.01
_GAIN = 1e-14
_MAX_ITERATIONS = 500


def workload_errors(
    coefficients: np.ndarray, workload: Workload, column_normalize: bool
) -> np.ndarray:
    """Returns the squared row norms of `A C^-1` for a Toeplitz strategy.

    Args:
      coefficients: `(b,)` float64 of norm 1.
      workload: A.
      column_normalize: whether the columns of C are divided by their norms.

    Returns:
      `(n,)` float64; `inf` where C^-1 overflows.

    Raises:
      ValueError: n b is too large.
    """
    n, b = workload.num_steps, len(coefficients)
    check_shape(n, b)
    columns = np.tile(coefficients, (n, 1))
    if column_normalize:
        columns = normalize_columns(columns)
    errors = BandedErrors(n, b, workload.blocks(block_size(b))).evaluate(columns)
    return np.where(np.isnan(errors), np.inf, errors)


def optimal_for_workload(
    start: np.ndarray,
    workload: Workload,
    error: str,
    column_normalize: bool,
    callback: Callable[[Progress], object] | None = None,
) -> np.ndarray:
    """Returns the coefficients with the lowest error at largest column norm 1.

    Args:
      start: `(b,)` float64, where the search begins; the first is not zero.
      workload: A.
      error: "mean" or "max"; the largest is approached through power means of rising order.
      column_normalize: whether the columns of C are divided by their norms.
      callback: called with a `Progress` after every iteration.

    Returns:
      `(b,)` float64 with leading 1: the best met, never worse than `start`.

    Raises:
      ValueError: n b is too large.
    """
    n, b = workload.num_steps, len(start)
    check_shape(n, b)
    errors = BandedErrors(n, b, workload.blocks(block_size(b)))
    reduce = np.mean if error == "mean" else np.max
    # Column j has its first n - j entries; all columns but the last b - 1 are whole.
    lengths = np.minimum(n - np.arange(n), b)

    def norms(coefficients: np.ndarray) -> np.ndarray:
        squares = np.cumsum(np.square(coefficients))
        return np.sqrt(squares[lengths - 1] if column_normalize else np.full(n, squares[-1]))

    def loss(free: np.ndarray) -> float:
        coefficients = np.concatenate([[1.0], free])
        found = errors.evaluate(coefficients / norms(coefficients)[:, None])
        return float(reduce(found)) if np.all(np.isfinite(found)) else np.inf

    def objective(free: np.ndarray, power: float) -> tuple[float, np.ndarray]:
        coefficients = np.concatenate([[1.0], free])
        norm = norms(coefficients)[:, None]
        found = errors.evaluate(coefficients / norm)
        if not 0.0 < np.max(found) < np.inf:
            return np.inf, free
        value, weights = power_mean(found, power)
        gradient = errors.gradient(weights)
        # C[j + k, j] = c_k / s_j with s_j^2 the sum of the c_k^2 the column has.
        along = np.sum(gradient * coefficients, axis=1) / norm[:, 0] ** 3
        counted = lengths if column_normalize else np.full(n, b)
        by_length = np.bincount(counted, weights=along, minlength=b + 1)
        through_norm = np.cumsum(by_length[::-1])[::-1][1:] * coefficients
        return value, (np.sum(gradient / norm, axis=0) - through_norm)[1:]

    best = point = np.array(start[1:] / start[0])
    best_loss = loss(best)
    for power, gain in stages(error, _GAIN):
        found = descend(
            lambda free, power=power: objective(free, power),
            point,
            _FIRST_STEP,
            gain,
            _MAX_ITERATIONS,
            callback=callback,
        )
        point = found.point
        if (value := loss(point)) < best_loss:
            best, best_loss = point, value
    return np.concatenate([[1.0], best])
