"""Column normalization of a Toeplitz strategy: the columns that it changes, and their errors.

If the coefficients have norm 1, only the last b - 1 columns of C are shorter than 1, so only the
last b - 1 rows of A C^-1 differ from those of the raw strategy. Everything here costs O(b^2), for
any n.
"""

from __future__ import annotations

import numpy as np


def tail_scale(coefficients: np.ndarray) -> np.ndarray:
    """Returns the norms of the last b - 1 columns of the raw Toeplitz matrix.

    Dividing column j of T by its norm s_j gives C = T diag(1/s) and C^-1 = diag(s) T^-1, so the
    noise row that is released is multiplied by s_j.

    Args:
      coefficients: `(b,)` float64, first column of T.

    Returns:
      `(b - 1,)` float64, in the order of the columns (decreasing).
    """
    return np.sqrt(np.cumsum(np.square(coefficients)))[:-1][::-1].copy()


def lagged_products(sums: np.ndarray, num_bands: int) -> np.ndarray:
    """Returns `sum_t x_t x_{t-k}` for k below `num_bands`, by one transform.

    Args:
      sums: `(m,)` float64, the sequence x.
      num_bands: the number of lags.

    Returns:
      `(num_bands,)` float64. Entries for lags of m and above are zero.
    """
    length = 1 << (len(sums) + num_bands).bit_length()
    spectrum = np.fft.rfft(sums, length)
    return np.fft.irfft(spectrum.real**2 + spectrum.imag**2, length)[:num_bands]


def tail_errors(scale: np.ndarray, window: np.ndarray, lagged: np.ndarray) -> np.ndarray:
    """Returns e_i of the last b - 1 rows of the column-normalized strategy.

    Let w be the raw process A T^-1 z, with covariances K_{i,j} = sum_{t <= j} x_t x_{t+i-j}. By
    summation by parts the normalized process is v_i = s_i w_i + sum_{j<i} (s_j - s_{j+1}) w_j. The
    sum starts at row m - 1 = n - b, before which s = 1. Row i of K follows from row i - 1 by one
    product, so e_i = Var(v_i) costs O(b) for each row.

    Args:
      scale: `(b - 1,)` float64, `tail_scale` of the coefficients.
      window: `(2 b - 2,)` float64, x from step m - b + 1 to n - 1 (zero before step 0).
      lagged: `(b,)` float64, `sum_{t < m} x_t x_{t-k}` for k = 0 .. b - 1.

    Returns:
      `(b - 1,)` float64.
    """
    tail = len(scale)
    steps = np.concatenate([[1.0], scale])
    drops = np.append(steps[:-1] - steps[1:], 0.0)
    covariance = np.array(lagged, np.float64)
    partial = drops[0] ** 2 * covariance[0]
    errors = np.empty(tail)
    for r in range(1, tail + 1):
        # window[r : r + b] is x_{i-b+1} .. x_i for row i = m - 1 + r.
        newest_first = window[r - 1 : r + tail][::-1]
        covariance += newest_first[0] * newest_first
        cross = drops[:r][::-1] @ covariance[1 : r + 1]
        errors[r - 1] = steps[r] ** 2 * covariance[0] + 2.0 * steps[r] * cross + partial
        partial += drops[r] ** 2 * covariance[0] + 2.0 * drops[r] * cross
    return errors


def extend_window(coefficients: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Returns x from step m - b + 1 to n - 1, given the state at step m = n - b + 1.

    Args:
      coefficients: `(b,)` float64.
      state: `(b,)` float64, `(x_m, h_m, h_{m-1}, ..., h_{m-b+2})`.

    Returns:
      `(2 b - 2,)` float64.
    """
    tail = len(coefficients) - 1
    newest = -coefficients[1:] / coefficients[0]
    response = np.zeros(2 * tail - 1)
    response[:tail] = state[1:][::-1]
    for i in range(tail, 2 * tail - 1):
        response[i] = newest @ response[i - tail : i][::-1]
    before = state[0] - np.cumsum(state[1:])[::-1]
    after = state[0] + np.cumsum(response[tail:])
    return np.concatenate([before, [state[0]], after])
