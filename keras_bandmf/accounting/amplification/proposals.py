"""Where the samples of the estimate are drawn, and the largest weight that one of them can have.

Both divergences of the pair are tiny shares of samples drawn from P or Q. So samples come from a
mixture over the groups of laws tilted towards the event, of density `D` with respect to Q, and
count `dP / dD` or `dQ / dD` times. A sum over groups of convex functions of `L_j` is at least that
function of their mean, which bounds the weights: see `Tilt`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.special
import scipy.stats

from keras_bandmf.sampling.patterns import AllocationInGroup, PoissonInGroup

Law = PoissonInGroup | AllocationInGroup

#: Of a tilt.
LARGEST_POWER = 12

#: Of `room` of a shift, as a quantile: compiled by XLA, `ndtri` loses digits in its lower tail.
_LEAST_QUANTILE = -3.0

#: Tries of the rejection sampler of the add direction.
TRIES = 16


class Tilt(NamedTuple):
    """A proposal of the remove direction: density `sum_j weight_j L_j H_j / Z_j`.

    `H_j = prod_i (1 - q + q u_i)^power` over the rounds of the group. In group j a pattern is drawn
    by the law, and each coordinate from the normal law times the power: a mixture of normals of
    deviation 1 at multiples of 1 / sigma.

    Attributes:
        power: p, an integer of at least 1.
        probability: q.
        chosen: probabilities of the multiples 1, .., p + 1 in rounds of the pattern, shape (p+1,).
        others: probabilities of the multiples 0, .., p in other rounds, shape (p + 1,).
        inclusion: Poisson only: the probability of a round to be in the pattern.
        log_norms: `log Z_j`, shape (b,).
    """

    power: int
    probability: float
    chosen: np.ndarray
    others: np.ndarray
    inclusion: float
    log_norms: np.ndarray


def tilt(law: Law, sigma: float, power: int, probability: float) -> Tilt:
    """Returns the proposal of the remove direction with this power and probability."""
    multiples = np.arange(power + 1)
    log_terms = scipy.stats.binom.logpmf(multiples, power, probability)
    # E u^m = exp((m^2 - m) / (2 sigma^2)).
    others = log_terms + (multiples**2 - multiples) / (2.0 * sigma**2)
    chosen = log_terms + (multiples**2 + multiples) / (2.0 * sigma**2)
    log_other, log_chosen = _log_sum(others), _log_sum(chosen)
    rounds = law.rounds.of_group()
    inclusion = 0.0
    if isinstance(law, PoissonInGroup):
        q = law.probability
        log_terms = [math.log(q) + log_chosen]
        log_terms += [math.log1p(-q) + log_other] if q < 1.0 else []
        log_round = _log_sum(np.array(log_terms))
        inclusion = math.exp(log_terms[0] - log_round)
        log_norms = rounds * log_round
    else:
        k = law.participations
        log_norms = k * log_chosen + (rounds - k) * log_other
    return Tilt(
        power,
        probability,
        np.exp(chosen - log_chosen),
        np.exp(others - log_other),
        inclusion,
        log_norms,
    )


def largest_weight(law: Law, proposal: Tilt, epsilon: float) -> float:
    """Returns a bound on the weighted samples `(1 - e^epsilon / L)_+ L / D`.

    Formal guarantees: for Poisson and the law's own q, `H_j = L_j^p`, and `D >= L^(p+1) / max Z`
    since x^(p+1) is convex. For exactly k of r rounds, `prod (1 - q + q u_i)` is a mean over m,
    by Binomial(r, q), of `E_m`, the mean of products over m-subsets; for m <= k Maclaurin's
    inequality has `E_m >= E_k^(m/k)`, hence `H_j >= G(L_j)^p` with
    `G(x) = sum_{m<=k} Binomial(m) x^(m/k)`. Then `x G(x)^p` is convex: it is e^h with
    `h(t) = t + p log G(e^t)` of t = log x, which is convex and has a slope of at least 1. So
    `D >= L G(L)^p / max Z`. The least Binomial weight of all groups is taken. The weight is at most
    max over L > e^epsilon of `(1 - e^epsilon / L) max Z / G(L)^p`, evaluated on a grid of log L, at
    the upper end of each cell for the first factor and at the lower for the second.
    """
    steps = np.concatenate([np.arange(0.0, 6.0, 1.0 / 256), np.geomspace(6.0, 1e4, 1024)])
    log_least = epsilon + steps
    log_g = _log_g(law, proposal.probability, log_least)
    gain = np.append(-np.expm1(-steps[1:]), 1.0)
    with np.errstate(divide="ignore", over="ignore"):
        values = np.log(gain) + proposal.log_norms.max() - proposal.power * log_g
        return float(np.exp(values.max())) * (1.0 + 1e-9)


def _log_g(law: Law, probability: float, log_ratio: np.ndarray) -> np.ndarray:
    if isinstance(law, PoissonInGroup):
        return log_ratio
    k = law.participations
    orders = np.arange(k + 1)
    rounds = np.unique(law.rounds.of_group())
    weights = np.min([scipy.stats.binom.logpmf(orders, r, probability) for r in rounds], axis=0)
    return _log_sum(weights + log_ratio[:, None] * orders / k)


def best_tilt(law: Law, sigma: float, epsilon: float) -> tuple[Tilt, float]:
    """Returns a proposal of the remove direction, and its largest weight.

    The smallest largest weight is attained where all groups are equally likely, which is rare. Of
    powers whose largest weights are not twice the smallest, the largest makes the variance least.
    """
    if isinstance(law, PoissonInGroup):
        probabilities = [law.probability]
    else:
        share = law.participations / law.rounds.most
        probabilities = [p for p in share * np.geomspace(0.2, 2.0, 25) if p < 1.0]
    found: list[tuple[float, Tilt]] = []
    for power in range(1, LARGEST_POWER + 1):
        proposals = [tilt(law, sigma, power, float(p)) for p in probabilities]
        bounds = [largest_weight(law, proposal, epsilon) for proposal in proposals]
        best = int(np.argmin(bounds))
        found.append((bounds[best], proposals[best]))
        if bounds[best] > 4.0 * min(bound for bound, _ in found):
            break
    least = min(bound for bound, _ in found)
    bound, proposal = [pair for pair in found if pair[0] <= 2.0 * least][-1]
    return proposal, bound


class Dip(NamedTuple):
    """A proposal of the add direction for Poisson: density `sum_j weight_j prod_i a(x_i)`.

    `a(x) = accepted ((1 - q) / (1 - q + q u))^power + rest` is the law of the first of `TRIES`
    normals that is accepted with probability `((1 - q) / (1 - q + q u))^power`, or of another
    normal if none is.

    Attributes:
        power: theta, above 0.
        accepted: a factor, see above.
        rest: the probability that none is accepted.
    """

    power: float
    accepted: float
    rest: float


def best_dip(law: PoissonInGroup, sigma: float, epsilon: float) -> tuple[Dip, float]:
    """Returns the proposal of the add direction with the smallest largest weight, and that.

    Formal guarantees: `D >= sum_j weight_j prod_i accepted (1 - q)^theta (1 - q + q u_i)^-theta`,
    at least `accepted^r (1 - q)^(r theta) L^-theta` since x^-theta is convex, with r the most
    rounds of a group, as `accepted (1 - q)^theta` is at most 1 (Jensen). So the weighted
    sample `(1 - e^epsilon L)_+ / D` is at most the inverse of this factor times
    `max L^theta (1 - e^epsilon L) = e^(-epsilon theta) theta^theta / (1 + theta)^(1 + theta)`.
    """
    q, rounds = law.probability, law.rounds.most
    found: list[tuple[float, Dip]] = []
    for power in np.geomspace(0.05, 200.0, 120):
        chance = acceptance(q, sigma, power)
        if chance < 1e-12:
            break  # it falls with the power, and none of the tries would be accepted
        log_rest = TRIES * math.log1p(-chance)
        rest, accepted = math.exp(log_rest), -math.expm1(log_rest) / chance
        log_bound = -rounds * (math.log(accepted) + power * math.log1p(-q))
        log_bound += power * math.log(power) - (1.0 + power) * math.log1p(power) - epsilon * power
        found.append((log_bound, Dip(float(power), accepted, rest)))
    # What the quadrature of `acceptance` is off by is far below this.
    log_bound, dip = min(found, key=lambda pair: pair[0])
    return dip, math.exp(log_bound) * (1.0 + 1e-9)


def acceptance(probability: float, sigma: float, power: float) -> float:
    """The mean of `((1 - q) / (1 - q + q u))^power` over a normal, by the trapezoid rule.

    The function is analytic in a strip of width pi sigma around the real axis and bounded there
    by a moderate number, so that at steps of 1/64 the rule is exact to float64.
    """
    x = np.arange(-10 * 64, 10 * 64 + 1) / 64.0
    log_u = x / sigma - 0.5 / sigma**2
    log_mixed = np.logaddexp(math.log1p(-probability), math.log(probability) + log_u)
    values = np.exp(power * (math.log1p(-probability) - log_mixed))
    return float(np.sum(values * np.exp(-(x**2) / 2.0)) / (64.0 * math.sqrt(2.0 * math.pi)))


class Shift(NamedTuple):
    """A proposal of the add direction: the noise along the mean of `C X` is another normal.

    With s the noise along that direction, s is drawn from N(-tilt, 1) given `s < limit`, and all
    directions orthogonal to it as before. So `D = exp(-tilt s - tilt^2 / 2) / room` below the
    limit, and 0 above.

    Attributes:
        tilt: at least 0.
        limit: above it `L` is at least `e^-epsilon`, and the weighted sample is 0 anyway.
        room: the probability that N(-tilt, 1) is below the limit.
    """

    tilt: float
    limit: float
    room: float


def shift(
    mean_square: float, participations: float, sigma: float, epsilon: float, tilt: float
) -> Shift:
    """Returns the shift with this tilt: see `best_shift`."""
    limit = (participations / (2.0 * sigma**2) - epsilon) * sigma / math.sqrt(mean_square)
    return Shift(tilt, limit, float(scipy.stats.norm.cdf(limit + tilt)))


def best_shift(
    mean_square: float, participations: float, sigma: float, epsilon: float
) -> tuple[float, float]:
    """Returns the tilt of the shift with the smallest largest weight, and that weight.

    Only tilts are considered whose `room` is at least 1e-3: see `_LEAST_QUANTILE`.

    Formal guarantees: with m the mean of `C X`, X the pattern, k the expected number of
    participations, `mu = |m| / sigma` and s the noise along m, Jensen's inequality has
    `log L >= mu s - k / (2 sigma^2)`, which is `mu (s - limit) - epsilon`. So
    `(1 - e^epsilon L)_+` is 0 from the limit on, and at most `1 - e^(-mu d)` at `limit - d`. The
    weighted sample is at most the maximum over d of
    `(1 - e^(-mu d)) e^(-tilt d) * room * exp(tilt limit + tilt^2 / 2)`; the first two factors are
    at most `a^a / (1 + a)^(1 + a)` with `a = tilt / mu`.

    Args:
        mean_square: |m|^2, above 0.
        participations: k.
        sigma: the noise multiplier.
        epsilon: of the hockey stick.
    """
    limit = shift(mean_square, participations, sigma, epsilon, 0.0).limit
    least = max(0.0, _LEAST_QUANTILE - limit)
    tilts = np.arange(least, max(least, -limit) + 20.0, 1.0 / 64)
    a = tilts * sigma / math.sqrt(mean_square)
    log_bounds = tilts * limit + tilts**2 / 2.0 + scipy.stats.norm.logcdf(limit + tilts)
    log_bounds += scipy.special.xlogy(a, a) - (1.0 + a) * np.log1p(a)
    best = int(np.argmin(log_bounds))
    return float(tilts[best]), math.exp(log_bounds[best]) * (1.0 + 1e-9)


def _log_sum(values: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(values, axis=-1)
