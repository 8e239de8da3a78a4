"""The add direction of exactly k of n steps in one group, from distributions in place of samples.

With one band all examples are in one group, and the ratios `u_i` of the steps are independent. Then
a bound on the divergence can be computed as for a composition of mechanisms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import scipy.signal
import scipy.special

#: The points of the grid of a sum of ratios.
_POINTS = 2**20
#: Logarithms of means and of their products lie on a grid of this step, between these values.
_LOG_STEP = 2.0**-13
_LOG_LEAST, _LOG_MOST = -16.0, 4.0
#: More than what rounding can hide in one convolution of distributions by Fourier transforms.
_ROUNDING = 1e-13


@functools.lru_cache(maxsize=64)
def add_bound(steps: int, participations: int, sigma: float, epsilon: float) -> float:
    """Returns an upper bound on the add direction of exactly k participations in n steps.

    Formal guarantees: cut the steps, in a random order, into k blocks as equal as possible. A
    uniform subset of k steps has the law of one uniform step of each block. The divergence is
    jointly convex, so it is at most that of one step in each of k fixed blocks, whose ratio is
    `L = prod_m M_m` with `M_m` the mean of the independent `u_i` of a block. `(1 - e^epsilon L)_+`
    falls with L, and all values are rounded down: `u_i` to a grid and to its largest value,
    logarithms of means and of their products to another grid and to its largest value, and what is
    below its least value to 0. Convolutions of distributions by Fourier transforms are off by few
    units in the last place of 1 for each entry, which `_ROUNDING` exceeds in sum; it is added for
    each convolution.

    Args:
        steps: n.
        participations: k, at most n.
        sigma: the noise multiplier, for columns of norm 1.
        epsilon: of the hockey stick, at least 0.

    Returns:
        The bound, at most 1.
    """
    size, longer = divmod(steps, participations)
    parts = [_power(_log_mean(size, sigma), participations - longer, _product)]
    if longer:
        parts.append(_power(_log_mean(size + 1, sigma), longer, _product))
    product = parts[0] if len(parts) == 1 else _product(*parts)
    logs = _LOG_LEAST + _LOG_STEP * np.arange(len(product))
    # What is missing from the sum counts as L = 0.
    lost = max(0.0, 1.0 - float(product.sum()))
    delta = float(np.sum(product * -np.expm1(np.minimum(epsilon + logs, 0.0)))) + lost
    convolutions = 4 * (math.log2(size + 1) + math.log2(participations) + 2)
    return min(1.0, delta + _ROUNDING * convolutions)


def _log_mean(size: int, sigma: float) -> np.ndarray:
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
    mean = _power(ratio, size, _sum)
    values = np.log(np.arange(1, _POINTS) * step)
    places = np.floor((np.minimum(values, _LOG_MOST) - _LOG_LEAST) / _LOG_STEP).astype(int)
    fits = places >= 0
    count = int((_LOG_MOST - _LOG_LEAST) / _LOG_STEP) + 1
    return np.bincount(places[fits], weights=mean[1:][fits], minlength=count)


def _power(
    distribution: np.ndarray, count: int, combine: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """The distribution of `count` independent values combined, by repeated squaring."""
    result: np.ndarray | None = None
    while True:
        if count % 2:
            result = distribution if result is None else combine(result, distribution)
        count //= 2
        if not count and result is not None:
            return result
        distribution = combine(distribution, distribution)


def _sum(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The distribution of a sum: what is above the grid counts as its largest value."""
    return _cut(_convolved(first, second), len(first))


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The distribution of a sum of logarithms: what is below the grid is lost."""
    whole = _convolved(first, second)
    # Entry 0 of the convolution is at twice the least value.
    return _cut(whole[round(-_LOG_LEAST / _LOG_STEP) :], len(first))


def _cut(distribution: np.ndarray, length: int) -> np.ndarray:
    kept = distribution[:length].copy()
    kept[-1] += distribution[length:].sum()
    return kept


def _convolved(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    # Rounding leaves negative entries, too: as zeros they only add to what is counted.
    return np.maximum(scipy.signal.fftconvolve(first, second), 0.0)
