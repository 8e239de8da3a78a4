"""Upper confidence bounds for the mean of bounded samples."""

from __future__ import annotations

import math

import numpy as np

#: Each gives a bound of its own, with a share of the failure probability: gamma times B. Large ones
#: suit samples that are 0 or B, small ones samples that are all far below B.
SHARES = 0.9 * 4.0 ** -np.arange(4.0)


def factors(largest: float) -> np.ndarray:
    """The numbers gamma of samples that are at most `largest`, B."""
    return SHARES / max(largest, 1e-300)


def upper_bound(count: int, log_sums: np.ndarray, largest: float, failure: float) -> float:
    """Returns a number that the mean of independent samples of one law does not exceed.

    Formal guarantees: whatever the law of the samples X in [0, B], the true mean m exceeds the
    number returned with probability at most `failure`. For a gamma below 1 / B that was fixed in
    advance, the product of all `1 - gamma X` is not negative and has the mean `(1 - gamma m)^N`. So
    by Markov's inequality it exceeds `(1 - gamma m)^N / a` with probability at most a, and else
    `m <= (1 - exp((sum of log(1 - gamma X) + log a) / N)) / gamma`. The lowest of the bounds of all
    gammas is returned, each at its share a of `failure`. Where samples are 0 or B it is that of
    Chernoff and Hoeffding for the best gamma; where their variance is small it is close to that of
    Bennett.

    Args:
        count: N.
        log_sums: the sums of log(1 - gamma X) for the gammas of `factors`.
        largest: B.
        failure: in (0, 1).
    """
    if not math.isfinite(largest):
        return math.inf
    log = math.log(failure / len(SHARES))
    # Rounding in the sums is far below the factor.
    bounds = -np.expm1((log_sums + log) / count) / factors(largest) * (1.0 + 1e-9)
    return float(min(bounds.min(), max(largest, 1e-300)))
