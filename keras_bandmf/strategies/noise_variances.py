"""The variance of the noise of each step: the squared norms of the rows of C^-1."""

from __future__ import annotations

import numpy as np
import scipy.signal

from keras_bandmf.strategies.banded_inverse import BandedInverseStrategy
from keras_bandmf.strategies.base import Strategy
from keras_bandmf.strategies.errors.banded import BandedErrors, WorkloadBlocks, block_size


def noise_variances(strategy: Strategy) -> np.ndarray:
    """Returns the variance of one coordinate of each row of the noise `C^-1 Z`, for unit Z.

    It takes O(n b) operations where all rows of C have the same coefficients, and O(n b^2) where
    they differ.

    Args:
      strategy: a strategy that a plan can train with.

    Returns:
      `(n,)` float64: the squared norms of the rows of C^-1; `inf` where C^-1 overflows.

    Raises:
      NotImplementedError: if C is neither banded nor has a banded inverse.
    """
    n = strategy.num_steps
    if isinstance(strategy, BandedInverseStrategy):
        squares = np.zeros(n)
        taps = strategy.noise_taps()
        squares[: len(taps)] = np.square(taps)
        return np.cumsum(squares)
    rows = strategy.noise_rows()
    bands = rows.shape[1]
    if len(rows) == n:
        variances = BandedErrors(n, bands, _identity(block_size(bands))).evaluate(_columns(rows))
    else:
        impulse = np.append(1.0, np.zeros(n - 1))
        with np.errstate(over="ignore", invalid="ignore"):
            variances = np.cumsum(np.square(scipy.signal.lfilter([1.0], rows[0], impulse)))
    tail = strategy.tail_scale()
    variances[n - len(tail) :] *= np.square(tail)
    return np.where(np.isnan(variances), np.inf, variances)


def _identity(block: int) -> WorkloadBlocks:
    """Returns the workload that has the rows of noise themselves as its outputs, and no state."""
    return WorkloadBlocks(
        keep=np.zeros((1, 0, 0)),
        drive=np.zeros((1, 0, block)),
        read_state=np.zeros((1, block, 0)),
        read_input=np.eye(block)[None],
    )


def _columns(rows: np.ndarray) -> np.ndarray:
    """Returns the columns of C from its rows: entry k is that of the row k below the diagonal."""
    columns = np.zeros_like(rows)
    for lag in range(rows.shape[1]):
        columns[: len(rows) - lag, lag] = rows[lag:, lag]
    return columns
