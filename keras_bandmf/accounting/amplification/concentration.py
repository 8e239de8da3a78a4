"""Upper confidence bounds for the mean of bounded samples."""

from __future__ import annotations

import math

import scipy.optimize


def upper_bound(count: int, mean: float, variance: float, largest: float, failure: float) -> float:
    """Returns a number that the mean of independent samples in [0, largest] does not exceed.

    Formal guarantees: whatever the law of the samples, the true mean exceeds the number returned
    with probability at most `failure`. The lower of two bounds is returned, each of which fails
    with at most half of it: that of Chernoff and Hoeffding for the relative entropy (Hoeffding
    1963, equation 2.1), and the empirical Bernstein bound of Maurer and Pontil ("Empirical
    Bernstein bounds and sample variance penalization", COLT 2009, theorem 4).

    Args:
        count: N, at least 2.
        mean: of the samples.
        variance: of the samples, with N - 1 in the denominator.
        largest: B, above 0.
        failure: in (0, 1).
    """
    if not math.isfinite(largest):
        return math.inf
    largest = max(largest, 1e-300)
    log = math.log(2.0 / failure)
    chernoff = largest * _entropy_bound(min(mean / largest, 1.0), log / count)
    log = math.log(4.0 / failure)
    bernstein = (
        mean + math.sqrt(2.0 * variance * log / count) + 7.0 * largest * log / 3.0 / (count - 1)
    )
    return min(chernoff, bernstein, largest)


def _entropy_bound(share: float, exponent: float) -> float:
    """The largest p with p >= share and KL(share, p) <= exponent, rounded up."""

    def excess(p: float) -> float:
        value = -exponent
        if share > 0.0:
            value += share * math.log(share / p)
        if share < 1.0:
            value += (1.0 - share) * (math.log1p(-share) - math.log1p(-p))
        return value

    high = 1.0 - 1e-15
    if share >= high or excess(high) <= 0.0:
        return 1.0
    low = max(share, 1e-300)
    return min(scipy.optimize.brentq(excess, low, high, xtol=1e-300, rtol=1e-9) * (1 + 1e-8), 1.0)
