"""The lattice on which clipped sums and noise are added, and what it costs.

Floats can give noise away: `z * stddev` takes only some of them, and sums with it take others
(Mironov, CCS 2012). So both are whole multiples of one power of two, and are added exactly.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import scipy.signal

from keras_bandmf.noise import taps
from keras_bandmf.noise.taps import NoiseTaps

#: The step is 2^-23 to 2^-22 of the standard deviation of `z`.
STEP_BITS = 22

#: How many standard deviations of a row are within the range of int32. A value beyond is cut. Its
#: probability, below 2^-110, is part of `finite.tail_total_variation`.
RANGE = 12.5

#: Between these, lattice points up to the end of the range are normal numbers of float32.
LEAST_STDDEV, LARGEST_STDDEV = 2.0**-80, 2.0**90

#: By how much each row of a batch may move the rounding of clipped sums, as a share of the clip
#: norm: twice the error of a sum, with and without an example. See `charged_norm`.
FLOAT32_ROUNDING, FLOAT64_ROUNDING = 36 * 2.0**-24, 2.0**-23

#: Partial sums of R replicas are rounded to R * 2^5 times finer steps.
_FINER_BITS = 5


class NoiseRows(Protocol):
    """What the noise needs to know about a strategy `C` for `n` steps with `b` bands.

    `C^-1 Z` is computed one row at a time: `x_i = (z_i - sum_k r_{i,k} x_{i-k}) / r_{i,0}`, and
    `scale_i * x_i` is released. The strategies of `keras_bandmf.strategies` have these attributes
    and methods, and so may a class of your own.

    Attributes:
        num_steps: The number of steps n.
        num_bands: The number of bands b.

    Example:
        >>> import keras_bandmf as bandmf
        >>> strategy = bandmf.strategies.ToeplitzStrategy([0.8, 0.6], num_steps=4)
        >>> strategy.noise_rows().round(3).tolist()
        [[0.8, 0.6]]
        >>> noise = bandmf.noise.CorrelatedNoise(strategy, stddev=1.0, shapes=[(3,)])
    """

    @property
    def num_steps(self) -> int:
        """The number of steps n."""

    @property
    def num_bands(self) -> int:
        """The number of bands b."""

    def noise_rows(self) -> np.ndarray:
        """Returns `r`, float64, of shape (1, b) if all rows are equal, and else of shape (n, b)."""

    def tail_scale(self) -> np.ndarray:
        """Returns the scales of the last t rows, float64, of shape (t,). Others have scale 1."""


def recurrence(strategy: NoiseRows) -> np.ndarray:
    """Returns the recurrence of the released rows `w_i = a_i z_i - sum_k c_{i,k} w_{i-k}`.

    Args:
        strategy: The strategy, which defines `C`.

    Returns:
        `a_i, c_{i,1}, .., c_{i,b-1}` of the last m of the n steps, float64, of shape (m, b).
        Earlier steps are like the first of these.
    """
    rows = np.asarray(strategy.noise_rows(), np.float64)
    tail = np.asarray(strategy.tail_scale(), np.float64)
    steps, bands = strategy.num_steps, strategy.num_bands
    count = steps if len(rows) == steps else min(steps, 1 + len(tail))
    scales = np.ones(bands + steps)
    scales[len(scales) - len(tail) :] = tail
    table = np.empty((count, bands))
    for index, step in enumerate(range(steps - count, steps)):
        row = rows[min(step, len(rows) - 1)]
        past = scales[bands + step - np.arange(bands)]
        table[index] = past[0] / row[0] * row / past
        table[index, 0] = past[0] / row[0]
    return table


def largest_row_norm(strategy: NoiseRows | NoiseTaps) -> float:
    """Returns the largest norm of a row of `C^-1`: the largest deviation of a released value.

    Args:
        strategy: The strategy, which defines `C`.
    """
    if isinstance(strategy, NoiseTaps):
        return taps.largest_row_norm(strategy)
    rows = np.asarray(strategy.noise_rows(), np.float64)
    scale = max(1.0, *np.abs(strategy.tail_scale()), 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        if len(rows) == 1:
            impulse = np.zeros(strategy.num_steps)
            impulse[0] = 1.0
            response = scipy.signal.lfilter([1.0], rows[0], impulse)
            return float(scale * np.sqrt(np.sum(np.square(response))))
        largest = 0.0
        lags = rows.shape[1] - 1
        covariance = np.zeros((lags, lags))  # of the last rows, the latest first
        for row in rows:
            cross = -(row[1:] @ covariance) / row[0]
            variance = (1.0 - row[1:] @ cross * row[0]) / row[0] ** 2
            largest = max(largest, variance) if np.isfinite(variance) else np.inf
            if lags:
                moved = np.empty_like(covariance)
                moved[1:, 1:] = covariance[:-1, :-1]
                moved[0, 0] = variance
                moved[0, 1:] = moved[1:, 0] = cross[:-1]
                covariance = moved
    return float(scale * np.sqrt(largest))


def step_exponent(stddev: float, row_norm: float) -> int:
    """Returns k of the step 2^k, for noise `C^-1 Z` with `Z` of standard deviation `stddev`.

    Args:
        stddev: The standard deviation, which is positive.
        row_norm: The `largest_row_norm` of the strategy.

    Raises:
        ValueError: If float32 cannot hold the lattice.
    """
    if not LEAST_STDDEV <= stddev <= LARGEST_STDDEV:
        raise ValueError(
            "The standard deviation of the noise must be 0 (no privacy) or from "
            f"{LEAST_STDDEV:.3g} to {LARGEST_STDDEV:.3g}, where float32 can hold its lattice. "
            f"Received: {stddev:.6g}. Scale the loss, and the clip norm with it."
        )
    if not row_norm < 2.0**20:
        raise ValueError(
            "The noise of the strategy grows beyond what the ring can hold. Received: a largest "
            f"row norm of C^-1 of {row_norm:.3g}. Use a strategy whose inverse is stable."
        )
    fine = math.floor(math.log2(stddev)) - STEP_BITS
    return max(fine, math.ceil(math.log2(RANGE * row_norm * stddev)) - 31)


def finer_bits(num_replicas: int) -> int:
    """Returns p: the partial sums of replicas are rounded to the lattice of step 2^(k - p)."""
    return 0 if num_replicas == 1 else _FINER_BITS + math.ceil(math.log2(num_replicas))


def rounding_steps(strategy: NoiseRows | NoiseTaps) -> float:
    """Returns what the float64 arithmetic of a row costs, in lattice steps of a coordinate.

    With a ring, a row is computed from whole numbers up to 2^31. The error of its rounding depends
    on them, and hence on the data: in a row after an example took part, it is as if another value
    had been added there. An example is followed by b rows, and two neighbors differ by twice the
    bound. Where rows are drawn again, see `taps.rounding_steps`.

    Args:
        strategy: The strategy, which defines `C`.
    """
    if isinstance(strategy, NoiseTaps):
        return taps.rounding_steps(strategy)
    table = recurrence(strategy)
    bands = table.shape[1]
    relative = (bands + 3) * 2.0**-53
    steps = relative * 2.0**31 * (1.0 + np.abs(table[:, 1:]).sum(axis=1)) / np.abs(table[:, 0])
    return float(2.0 * math.sqrt(bands) * steps.max() * np.abs(table[:, 0]).max())


def largest_batch(batch_size: int) -> float:
    """Returns the largest size of a batch, except with probability 1e-30 (Chernoff)."""
    return batch_size + 12.0 * math.sqrt(batch_size) + 100.0


def charged_norm(
    norm: float,
    strategy: NoiseRows | NoiseTaps,
    unit_stddev: float,
    size: int,
    batch_size: int,
    float64_sums: bool = False,
) -> float:
    """Returns the norm that the noise is scaled to, which includes the cost of rounding.

    Formal guarantees:
        The clipped sums on the lattice, with and without an example, differ by at most this norm
        (times that of its columns of `C`). Beyond `norm` it covers, proved: the rounding of the sum
        to the lattice (one step a coordinate), and before it of the partial sum of each replica
        to one that is finer by more than their number (rows may move from one replica to
        another, so all of them may change); `rounding_steps`; the rounding of the sum over a batch
        where it is in float64 (of at most `factors.LARGEST_CHAIN` terms, which are at most 362
        times the norm in sum: `factors.floored`), or where gradients of single examples are added
        (`factors.Rows`, chunks; look-ups, of at most 2^16 positions that read one row in a chunk,
        of any number where the positions of an example do not cancel each other). Assumed: in
        float32 products of matrices (`factors.Outer`), one example more changes the rounding by
        no more than that. Whoever chooses all others, and their order, can make it change by more
        than the clip norm.
        A batch has at most `largest_batch` rows: more are drawn with probability below 1e-30.

    Args:
        norm: The largest norm of an example's contribution.
        strategy: The strategy, which defines `C`.
        unit_stddev: The standard deviation of `Z` for a norm of 1.
        size: The number of released coordinates.
        batch_size: The expected batch size.
        float64_sums: Whether all sums are added up in float64.

    Raises:
        ValueError: If rounding would more than double the noise.
    """
    if unit_stddev == 0.0:
        return norm
    row_norm = largest_row_norm(strategy)
    rounding = FLOAT64_ROUNDING if float64_sums else FLOAT32_ROUNDING
    summed = norm * (1.0 + largest_batch(batch_size) * rounding)
    steps = (1.0 + 2.0**-_FINER_BITS + rounding_steps(strategy)) * math.sqrt(size)
    charged = summed
    while True:
        # The step of the lattice follows from the charged deviation, and may be twice as coarse.
        step = 2.0 ** step_exponent(unit_stddev * charged, row_norm)
        if charged >= summed + steps * step:
            return charged
        charged = (summed + steps * step) * (1.0 + 1e-12)
        if charged > 2.0 * summed:
            raise ValueError(
                "The lattice of the noise is too coarse for so many parameters: rounding to it "
                f"would more than double the noise. Received: {size} coordinates, noise of "
                f"standard deviation {unit_stddev * norm:.3g} at clip norm {norm:.3g}. Train "
                "fewer variables, or with less noise: its lattice is finer."
            )
