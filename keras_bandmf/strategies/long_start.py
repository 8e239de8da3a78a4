"""A start for the search for a long banded strategy of prefix sums, close to where it ends.

The optimal columns of a long run change slowly, and three short problems approximate them.

In the middle, column j depends only on the number `m = n - j` of steps still to come. Part of its
noise stays in the running sum of all of them, and the rest passes long before the end. So the
column minimizes `m s^2 + T`, where s is the noise that stays and T the error of the passing part.
The best Toeplitz strategy of n' steps minimizes the mean of that over m = n' ... 1, which is
`n' s^2 / 2 + T`: column j is its coefficients at `n' = 2 m`.

Near the end, where m changes fast, the columns are those of a shorter run with the same end.

Near the beginning, where there is no earlier noise to cancel, the columns are those of a run that
is cut off after a number of steps in proportion to the square root of n. The error of its last step
stands for those of all later steps.

At (n, b) = (10^4, 16) the search then takes 7 iterations instead of 56. At (10^6, 16) a start at
the Toeplitz optimum takes 300.
"""

from __future__ import annotations

import functools

import numpy as np
import scipy.interpolate

from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from keras_bandmf.strategies.search.banded import (
    FIRST_STEP,
    MEMORY,
    LogLoss,
    normalize_columns,
    weighted_mean,
)
from keras_bandmf.strategies.search.lbfgs import descend
from keras_bandmf.strategies.search.preconditioner import preconditioner_of
from keras_bandmf.strategies.toeplitz import ToeplitzStrategy
from keras_bandmf.strategies.workload import blocks_of

# The lengths of the short runs. Half of each is used, because the cut disturbs the other half.
_END_STEPS = 4096
_HEAD_ROOTS = 30  # In units of the square root of n.
_LEAST_BANDS = 64  # In units of b: neither run is shorter than this.
# How many Toeplitz strategies there are for each factor of ten in their length.
_A_DECADE = 8
# The short problems are solved to this share of the gain of the long one.
_GAIN = 0.1
_MAX_ITERATIONS = 1000


def is_long(num_steps: int, num_bands: int) -> bool:
    """Returns whether beginning, middle and end of a run of n steps are far enough apart."""
    head, end = _head_and_end(num_steps, num_bands)
    return num_bands > 1 and 4 * max(head, end) <= num_steps


def long_start(num_steps: int, num_bands: int, gain: float) -> np.ndarray:
    """Returns nearly optimal columns for the mean error of prefix sums.

    Args:
      num_steps: n, for which `is_long` is true with these bands.
      num_bands: b, at least 2.
      gain: the gain at which the search that starts there will end.

    Returns:
      `(n, b)` float64, columns of norm 1. Nothing guarantees how good they are, so the caller
      compares them with another start.
    """
    head, end = _head_and_end(num_steps, num_bands)
    columns = _middle(num_steps, num_bands)
    last = _solved(normalize_columns(columns[-end:]), np.ones(end), gain)
    columns[-(end // 2) :] = last[-(end // 2) :]
    weights = np.ones(head)
    weights[-1] += num_steps - head
    first = _solved(normalize_columns(columns[:head]), weights, gain)
    columns[: head // 2] = first[: head // 2]
    return columns


def _head_and_end(num_steps: int, num_bands: int) -> tuple[int, int]:
    least = _LEAST_BANDS * num_bands
    return max(least, int(_HEAD_ROOTS * np.sqrt(num_steps))), max(least, _END_STEPS)


def _middle(num_steps: int, num_bands: int) -> np.ndarray:
    """Returns column j from the Toeplitz optimum of 2 (n - j) steps, interpolated over lengths."""
    low, high = np.log(num_bands), np.log(2 * num_steps)
    count = 2 + int((high - low) / np.log(10.0) * _A_DECADE)
    lengths = np.unique(np.rint(np.exp(np.linspace(low, high, count))).astype(int))
    found = [ToeplitzStrategy.optimize(int(length), num_bands) for length in lengths]
    rows = np.array([one.coefficients / np.linalg.norm(one.coefficients) for one in found])
    between = scipy.interpolate.PchipInterpolator(np.log(lengths), rows)
    remaining = num_steps - np.arange(num_steps)
    wanted = np.clip(2 * remaining, lengths[0], lengths[-1])
    return normalize_columns(between(np.log(wanted)))


def _solved(start: np.ndarray, weights: np.ndarray, gain: float) -> np.ndarray:
    """Returns columns that minimize a weighted mean of the errors, from a start of norm 1."""
    n, b = start.shape
    blocks = blocks_of(None, n, block_size(b))
    mean = functools.partial(weighted_mean, weights=weights)
    objective = LogLoss(
        start, BandedErrors(n, b, blocks), mean, preconditioner_of(start, blocks), weights
    )
    point = np.zeros(start.size)
    found = descend(objective, point, FIRST_STEP, _GAIN * gain, _MAX_ITERATIONS, MEMORY)
    return normalize_columns(objective.columns(found.point))
