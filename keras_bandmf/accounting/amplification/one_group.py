"""The add direction of exactly k of n steps in one group, from distributions in place of samples.

With one band all examples are in one group, and the ratios `u_i` of the steps are independent. Then
a bound on the divergence can be computed as for a composition of mechanisms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.signal
import scipy.special

from keras_bandmf.sampling.patterns import AllocationInGroup

#: The points of the grid of a sum of ratios.
_POINTS = 2**20
#: Logarithms of means and of their products lie on a grid of this step, between these values.
_LOG_STEP = 2.0**-13
_LOG_LEAST, _LOG_MOST = -16.0, 4.0
#: A convolution by Fourier transforms of length N is off by less than this factor times
#: `eps log2(N)` times the norms of its arguments, in the Euclidean norm.
_FOURIER = 10.0


class _Distribution(NamedTuple):
    """Probabilities of the points of a grid, as computed.

    Attributes:
        values: what was computed, not negative.
        off: a bound on the sum of the absolute errors of the values, from Fourier transforms.
    """

    values: np.ndarray
    off: float


@functools.lru_cache(maxsize=64)
def add_bound(law: AllocationInGroup, sigma: float, epsilon: float) -> float:
    """Returns an upper bound on the add direction of exactly k participations in n steps.

    Formal guarantees: cut the steps, in a random order, into k blocks as equal as possible. A
    uniform subset of k steps has the law of one uniform step of each block. The divergence is
    jointly convex, so it is at most that of one step in each of k fixed blocks, whose ratio is
    `L = prod_m M_m` with `M_m` the mean of the independent `u_i` of a block. `(1 - e^epsilon L)_+`
    falls with L, and all values are rounded down: `u_i` to a grid and to its largest value,
    logarithms of means and of their products to another grid and to its largest value, and what is
    below its least value to 0. The errors of Fourier transforms are bounded, convolution by
    convolution, and their sum is added, since the function is at most 1. Other arithmetic takes
    float64 for real numbers.

    Args:
        law: with one group.
        sigma: the noise multiplier, for columns of norm 1.
        epsilon: of the hockey stick, at least 0.

    Returns:
        The bound, at most 1.

    Raises:
        ValueError: the law has several groups, whose ratios depend on each other.
    """
    if law.rounds.num_bands != 1:
        raise ValueError(f"Expected a law of one group. Received: {law}.")
    k = law.participations
    size, longer = divmod(law.rounds.num_steps, k)
    product = _power(_log_mean(size, sigma), k - longer, _product)
    if longer:
        product = _product(product, _power(_log_mean(size + 1, sigma), longer, _product))
    logs = _LOG_LEAST + _LOG_STEP * np.arange(len(product.values))
    # What is missing from the sum counts as L = 0.
    lost = max(0.0, 1.0 - float(product.values.sum()))
    delta = float(np.sum(product.values * -np.expm1(np.minimum(epsilon + logs, 0.0)))) + lost
    return min(1.0, delta + product.off)


def _log_mean(size: int, sigma: float) -> _Distribution:
    """The distribution of the logarithm of the mean of `size` ratios, on the grid of logarithms."""
    # A grid of the mean, which is never far from 1 for many ratios. Those are multiples of its step
    # times `size`.
    step = (16.0 if size < 16 else 4.0) / _POINTS
    edges = np.arange(_POINTS + 1) * (step * size)
    # P(u < edge), for u = exp(x / sigma - 1 / (2 sigma^2)).
    with np.errstate(divide="ignore"):
        below = scipy.special.ndtr(sigma * np.log(edges) + 0.5 / sigma)
    ratio = np.diff(below)
    ratio[-1] += 1.0 - below[-1]
    mean = _power(_Distribution(ratio, 0.0), size, _sum)
    values = np.log(np.arange(1, _POINTS) * step)
    places = np.floor((np.minimum(values, _LOG_MOST) - _LOG_LEAST) / _LOG_STEP).astype(int)
    fits = places >= 0
    count = int((_LOG_MOST - _LOG_LEAST) / _LOG_STEP) + 1
    logs = np.bincount(places[fits], weights=mean.values[1:][fits], minlength=count)
    return _Distribution(logs, mean.off)


def _power(
    distribution: _Distribution,
    count: int,
    combine: Callable[[_Distribution, _Distribution], _Distribution],
) -> _Distribution:
    """The distribution of `count` independent values combined, by repeated squaring."""
    result: _Distribution | None = None
    while True:
        if count % 2:
            result = distribution if result is None else combine(result, distribution)
        count //= 2
        if not count and result is not None:
            return result
        distribution = combine(distribution, distribution)


def _sum(first: _Distribution, second: _Distribution) -> _Distribution:
    """The distribution of a sum: what is above the grid counts as its largest value."""
    whole, off = _convolved(first, second)
    return _Distribution(_cut(whole, len(first.values)), off)


def _product(first: _Distribution, second: _Distribution) -> _Distribution:
    """The distribution of a sum of logarithms: what is below the grid is lost."""
    whole, off = _convolved(first, second)
    # Entry 0 of the convolution is at twice the least value.
    start = round(-_LOG_LEAST / _LOG_STEP)
    return _Distribution(_cut(whole[start:], len(first.values)), off)


def _cut(values: np.ndarray, length: int) -> np.ndarray:
    kept = values[:length].copy()
    kept[-1] += values[length:].sum()
    return kept


def _convolved(first: _Distribution, second: _Distribution) -> _Distribution:
    """The convolution: what its arguments are off by, and what the transforms add to that."""
    values = scipy.signal.fftconvolve(first.values, second.values)
    # The sum of N absolute errors is at most sqrt(N) times their Euclidean norm. The transforms
    # have up to twice as many points.
    norms = float(np.linalg.norm(first.values) * np.linalg.norm(second.values))
    own = math.sqrt(len(values)) * _FOURIER * np.finfo(float).eps * math.log2(2 * len(values))
    # Each argument counts with the sum of the other one, which is 1 up to its own errors.
    off = (first.off + second.off + first.off * second.off + own * norms) * (1.0 + 1e-9)
    # True values are not negative, so that zeros are closer to them.
    return _Distribution(np.maximum(values, 0.0), off)
