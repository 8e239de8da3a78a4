"""Where the search for a long banded strategy of prefix sums begins: close to where it ends.

The optimal columns of a long run change slowly, and three short problems say what they are.

In the middle, column j depends on the `m = n - j` steps still to come and on nothing else: its
noise stays in the running sum of all of them, and what it adds for a while is over long before. So
it is what minimises `m s^2 + T`, s the noise that stays and T the passing part. The best Toeplitz
strategy of n' steps minimises the mean of that over m = n' ... 1, `n' s^2 / 2 + T`: column j is its
coefficients at `n' = 2 m`.

Near the end, where m changes fast, columns are those of a shorter run that ends alike.

Near the beginning, where there is no noise yet to be cancelled, they are those of a run cut off
after a number of steps in proportion to the root of n, whose last step stands for all after it.

At (10^4, 16) the search then takes 7 iterations in place of 56; at (10^6, 16) a start of the
Toeplitz optimum takes 300.
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

# Lengths of the short runs. Half of each is used: what the cut disturbs does not reach further.
_END_STEPS = 4096
_HEAD_ROOTS = 30  # times the root of n
_LEAST_BANDS = 64  # times b: neither is shorter
# Toeplitz strategies for each factor of ten in their length.
_A_DECADE = 8
# The short problems are solved to a share of the gain of the long one.
_GAIN = 0.1
_MAX_ITERATIONS = 1000


def is_long(num_steps: int, num_bands: int) -> bool:
    """Whether beginning, middle and end of a run of n steps are far enough apart."""
    head, end = _head_and_end(num_steps, num_bands)
    return num_bands > 1 and 4 * max(head, end) <= num_steps


def long_start(num_steps: int, num_bands: int, gain: float) -> np.ndarray:
    """Returns nearly optimal columns for the mean error of prefix sums.

    Args:
      num_steps: n, `is_long` with these bands.
      num_bands: b, at least 2.
      gain: of the search that is to start there.

    Returns:
      `(n, b)` float64, columns of norm 1. Nothing says how good they are: to be compared with
      another start.
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
    """Column j from the Toeplitz optimum of 2 (n - j) steps, between lengths by interpolation."""
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
    """Columns that minimise a weighted mean of the errors, from a start of norm 1."""
    n, b = start.shape
    blocks = blocks_of(None, n, block_size(b))
    mean = functools.partial(weighted_mean, weights=weights)
    objective = LogLoss(
        start, BandedErrors(n, b, blocks), mean, preconditioner_of(start, blocks), weights
    )
    point = np.zeros(start.size)
    found = descend(objective, point, FIRST_STEP, _GAIN * gain, _MAX_ITERATIONS, MEMORY)
    return normalize_columns(objective.columns(found.point))
