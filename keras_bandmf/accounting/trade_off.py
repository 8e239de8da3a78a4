"""What an attacker can do: the trade-off curve that certified (epsilon, delta) pairs imply."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import scipy.special

from keras_bandmf._checks import checked_float
from keras_bandmf.accounting.accountant import COARSE_ACCURACY, FINITE_NOISE_SHARE
from keras_bandmf.accounting.composition import Event, composed_epsilons

#: The false-positive rates that a statement names.
FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
#: The deltas that a statement names, as shares of its own.
_DELTAS = (0.01, 0.1, 1.0, 10.0, 100.0)
#: More deltas, where the curve bends.
_MORE_DELTAS = (*np.geomspace(1e-4, 0.1, 25), *np.linspace(0.13, 0.97, 29))
_LEAST_DELTA = 1e-100
_MOST_LOG = 700.0
# Generous for some ten operations in float64, and for the quantiles of the normal distribution.
_SLACK, _MU_SLACK = 1e-12, 1e-6


@dataclasses.dataclass(frozen=True)
class TradeOff:
    """Upper bounds on what any attacker can do who compares two neighboring data sets.

    Formal guarantees:
        Whoever guesses, from all weights of the run, whether one known example took part has a
        false-positive rate (FPR) and a true-positive rate (TPR) with
        TPR <= exp(epsilon) FPR + delta and TPR <= 1 - exp(-epsilon) (1 - delta - FPR)
        for every pair that holds of the run. `true_positive_rate` is the least of these bounds
        over the pairs: no smaller than what the full curve of the accountant would allow. Pairs
        hold as `trade_off` says.

    Attributes:
        pairs: (epsilon, delta) pairs that hold together, delta ascending; at least one.
        shift: A shift of a Gaussian of deviation 1 that is at least as easy to tell from none as
            the run's ideal noise; infinite if none is known.
        slack: The delta of the statement.
    """

    pairs: tuple[tuple[float, float], ...]
    shift: float
    slack: float

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Returns the largest true-positive rate at a false-positive rate, rounded up.

        Args:
            false_positive_rate: In [0, 1].
        """
        rate = checked_float("false_positive_rate", false_positive_rate, minimum=0.0)
        if rate > 1.0:
            raise ValueError(
                "Expected `false_positive_rate` to be at most 1. Received: "
                f"false_positive_rate={rate}."
            )
        (most,) = largest_true_positive_rates(self.pairs, np.array([rate]))
        return min(1.0, float(most) * (1 + _SLACK) + 1e-15)

    def mu(self) -> float:
        """Returns a mu of Gaussian differential privacy that holds up to `slack`, rounded up.

        Formal guarantees:
            At every false-positive rate, the true-positive rate of any attacker is at most that of
            the best test of N(0, 1) against N(mu, 1), plus `slack`. Without slack no mu much
            below that of taking part in every step would hold: the far tail of a sampled Gaussian
            is that of the Gaussian. The bound on the rates is piecewise linear and concave, and
            the curve of mu is concave, so that their distance is largest at a corner: all are
            compared. `shift` bounds mu as well: up to the pair of the statement, noise of
            finitely many bits costs at most `slack`, and beyond it that pair's line is nearer.
        """
        starts, slopes = _lines(self.pairs)
        first, second = np.triu_indices(len(starts), 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = (starts[first] - starts[second]) / (slopes[second] - slopes[first])
        rates = np.unique(rates[(rates > 0.0) & (rates < 1.0)])
        bound = np.array([np.min(starts + slopes * rate) for rate in rates])
        rates, bound = np.append(rates, 0.0), np.append(bound, np.min(starts))
        kept = bound > self.slack * (1 + _SLACK)
        least = np.minimum(bound[kept] - self.slack, 1.0)
        shifts = scipy.special.ndtri(least) - scipy.special.ndtri(rates[kept])
        shifts = shifts[~np.isnan(shifts)]
        found = max(0.0, float(np.max(shifts, initial=0.0)))
        return min(found * (1 + _MU_SLACK) + 1e-9, self.shift)


def largest_true_positive_rates(
    pairs: Sequence[tuple[float, float]], false_positive_rates: np.ndarray
) -> np.ndarray:
    """Returns the largest true-positive rates that all pairs allow, up to rounding.

    Args:
        pairs: (epsilon, delta) pairs that hold together; epsilon may be infinite.
        false_positive_rates: Each in [0, 1], 1-D.

    Returns:
        For each false-positive rate, the least over the pairs of `exp(epsilon) FPR + delta`, of
        `1 - exp(-epsilon) (1 - delta - FPR)`, which says the same of the attack that answers the
        other way round, and of 1.
    """
    starts, slopes = _lines(pairs)
    return np.min(starts[:, None] + slopes[:, None] * false_positive_rates, axis=0)


def _lines(pairs: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the intercepts and slopes of lines that the true-positive rate is below."""
    epsilons, deltas = np.array(pairs, np.float64).T
    growth = np.exp(np.minimum(epsilons, _MOST_LOG))
    finite = epsilons < _MOST_LOG
    starts = np.concatenate([deltas[finite], 1.0 - (1.0 - deltas) / growth, [1.0]])
    return starts, np.concatenate([growth[finite], 1.0 / growth, [0.0]])


@functools.lru_cache(maxsize=64)
def trade_off(
    events: tuple[Event, ...], epsilon: float, delta: float, noise: float
) -> tuple[TradeOff, tuple[tuple[float, float], ...]]:
    """Returns what an attacker can do, and epsilon at five deltas.

    Formal guarantees: every pair is (epsilon, delta) of the mechanism that runs, with adversaries
    who see every step: epsilon is an upper bound of the accountant (see `composed_epsilon`) for
    ideal noise, and delta is raised by `noise` (1 + exp(epsilon)), which the finite noise may cost
    at that epsilon. The pair (`epsilon`, `delta`) is taken as given; where a random group is
    counted as secret it is better than the others, which give the group away.

    Args:
        events: (rounds, sampling probability, noise multiplier) of each mechanism.
        epsilon: Of the statement; finite.
        delta: Of the statement.
        noise: At least the total variation between the noise that runs and ideal noise.

    Returns:
        The trade-off, and (delta, epsilon) at delta/100, delta/10, delta, 10 delta, 100 delta, as
        far as they are below 1 and the finite noise leaves half of them.
    """
    named = [share * delta for share in _DELTAS if _LEAST_DELTA <= share * delta / 4 < 0.25]
    more = [float(each) for each in _MORE_DELTAS if each > delta]
    if len(set(events)) > 1:
        more = more[::4]  # each takes twenty times as long
    # First half of each named delta: its epsilon is above that of the rest of the whole.
    firsts = _ideal(events, [each / 2 for each in named])
    lefts = [
        each - noise * (1 + math.exp(min(first, _MOST_LOG)))
        for each, first in zip(named, firsts, strict=True)
    ]
    usable = [(each, left) for each, left in zip(named, lefts, strict=True) if left >= each / 2]
    asked = [left for _, left in usable] + more
    found = _ideal(events, asked)
    at = {each: value for (each, _), value in zip(usable, found, strict=False)}
    at = {each: min(value, epsilon) if each >= delta else value for each, value in at.items()}
    at[delta] = epsilon
    pairs = {(value, each) for each, value in at.items()}
    for value, ideal in zip(found[len(usable) :], more, strict=True):
        actual = ideal + noise * (1 + math.exp(min(value, _MOST_LOG)))
        if actual < 1.0:
            pairs.add((value, actual * (1 + _SLACK)))
    shift = math.sqrt(math.fsum(count / sigma**2 for count, _, sigma in events))
    curve = TradeOff(tuple(sorted(pairs, key=lambda pair: pair[1])), shift * (1 + _SLACK), delta)
    return curve, tuple(sorted(at.items()))


def finite_noise(delta: float, epsilon: float) -> float:
    """Returns the total variation that the noise of a run with this guarantee may cost at most.

    A run whose tail costs more at its epsilon withdraws its claim (`noise.finite.affords_tail`).

    Args:
        delta: Of the run.
        epsilon: Of the run.
    """
    return FINITE_NOISE_SHARE * delta / (1 + math.exp(min(epsilon, _MOST_LOG))) * (1 + 1e-9)


def _ideal(events: Sequence[Event], deltas: Sequence[float]) -> list[float]:
    """Returns epsilon at each delta, for ideal noise; `composed_epsilons` takes its share."""
    raised = [each / (1 - FINITE_NOISE_SHARE) * (1 - _SLACK) for each in deltas]
    return composed_epsilons(events, raised, COARSE_ACCURACY)[0]
