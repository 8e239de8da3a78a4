"""Toeplitz strategies for workloads other than prefix sums, computed column by column."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.fft
import scipy.signal

from keras_bandmf.strategies.arguments import ErrorMeasure, check_shape, reduced
from keras_bandmf.strategies.coefficients import square_root_coefficients
from keras_bandmf.strategies.errors.banded import BandedErrors, block_size, unit_response
from keras_bandmf.strategies.search.banded import normalize_columns, power_mean
from keras_bandmf.strategies.search.scipy_lbfgs import Progress, minimize
from keras_bandmf.strategies.search.staged import descend_in_stages
from keras_bandmf.strategies.workload import Workload

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
      ValueError: if n b is too large.
    """
    n, b = workload.num_steps, len(coefficients)
    check_shape(n, b, len(workload.curvatures))
    columns = np.tile(coefficients, (n, 1))
    if column_normalize:
        columns = normalize_columns(columns)
    errors = BandedErrors(n, b, workload.blocks(block_size(b))).evaluate(columns)
    return np.where(np.isnan(errors), np.inf, errors)


def constant_rate_coefficients(
    workload: Workload, num_bands: int, error: ErrorMeasure
) -> np.ndarray:
    """Returns nearly the best coefficients, without a column of C for each step.

    They are the optimum of a Toeplitz C whose columns are not normalized, at the mean learning rate
    throughout. A is then Toeplitz, too: with responses a_k, and x_k = a_k / c, the error of step i
    is the sum of the squares of x_k over k and over steps up to i. An evaluation costs O(n b) for
    each curvature.

    Args:
      workload: A, of n steps.
      num_bands: b, at most n.
      error: "mean" or "max".

    Returns:
      `(b,)` float64 with leading 1.

    Raises:
      RuntimeError: if the search did not end in a minimum.
    """
    n, b = workload.num_steps, num_bands
    if b == 1:
        return np.ones(1)
    steady = dataclasses.replace(workload, learning_rates=float(np.mean(workload.learning_rates)))
    response = unit_response(steady.blocks(block_size(1)), n, 0)
    counts = (n - np.arange(n)) / n if error == "mean" else np.ones(n)
    size = scipy.fft.next_fast_len(2 * n + b, real=True)

    def log_loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        coefficients = np.concatenate([[1.0], free])
        with np.errstate(over="ignore", invalid="ignore"):
            x = scipy.signal.lfilter([1.0], coefficients, response, axis=0)
            weighted = counts[:, None] * x
            value = float(np.sum(weighted * x))
        if not 0.0 < value < math.inf:
            return math.inf, free
        # d error / d c_j = -2 sum_i l_i x_(i-j), where l = C^-T (counts * x).
        adjoint = scipy.signal.lfilter([1.0], coefficients, weighted[::-1], axis=0)[::-1]
        spectra = scipy.fft.rfft(adjoint, size, axis=0) * scipy.fft.rfft(x, size, axis=0).conj()
        gradient = -2.0 * scipy.fft.irfft(np.sum(spectra, axis=1), size)[:b] / value
        square = float(coefficients @ coefficients)
        gradient += 2.0 * coefficients / square
        return math.log(value) + math.log(square), gradient[1:]

    start = square_root_coefficients(b)
    return np.concatenate([[1.0], minimize(log_loss, start[1:] / start[0]).point])


def optimal_for_workload(
    start: np.ndarray,
    workload: Workload,
    error: ErrorMeasure,
    column_normalize: bool,
    callback: Callable[[Progress], object] | None = None,
) -> np.ndarray:
    """Returns the coefficients with the lowest error at largest column norm 1.

    Args:
      start: `(b,)` float64, where the search begins. The first is not zero.
      workload: A.
      error: "mean" or "max". The largest is approached through power means of rising order.
      column_normalize: whether the columns of C are divided by their norms.
      callback: called with a `Progress` after every iteration.

    Returns:
      `(b,)` float64 with leading 1: the best that was found, never worse than `start`.

    Raises:
      ValueError: if n b is too large.
    """
    n, b = workload.num_steps, len(start)
    check_shape(n, b, len(workload.curvatures))
    errors = BandedErrors(n, b, workload.blocks(block_size(b)))
    # Column j has n - j entries at most; all columns but the last b - 1 have all b.
    lengths = np.minimum(n - np.arange(n), b)

    def norms(coefficients: np.ndarray) -> np.ndarray:
        squares = np.cumsum(np.square(coefficients))
        return np.sqrt(squares[lengths - 1] if column_normalize else np.full(n, squares[-1]))

    def loss(free: np.ndarray) -> float:
        coefficients = np.concatenate([[1.0], free])
        found = errors.evaluate(coefficients / norms(coefficients)[:, None])
        return reduced(found, error) if np.all(np.isfinite(found)) else np.inf

    def objective(free: np.ndarray, power: float) -> tuple[float, np.ndarray]:
        coefficients = np.concatenate([[1.0], free])
        norm = norms(coefficients)[:, None]
        found = errors.evaluate(coefficients / norm)
        if not 0.0 < np.max(found) < np.inf:
            return np.inf, free
        value, weights = power_mean(found, power)
        gradient = errors.gradient(weights)
        # C[j + k, j] = c_k / s_j, where s_j^2 is the sum of the c_k^2 that column j has.
        along = np.sum(gradient * coefficients, axis=1) / norm[:, 0] ** 3
        counted = lengths if column_normalize else np.full(n, b)
        by_length = np.bincount(counted, weights=along, minlength=b + 1)
        through_norm = np.cumsum(by_length[::-1])[::-1][1:] * coefficients
        return value, (np.sum(gradient / norm, axis=0) - through_norm)[1:]

    first = np.array(start[1:] / start[0])
    best = descend_in_stages(objective, loss, first, error, _MAX_ITERATIONS, callback)
    return np.concatenate([[1.0], best])
