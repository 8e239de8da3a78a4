"""Upper bounds on epsilon: the Gaussian mechanism, and compositions of Poisson-sampled ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.fft
import scipy.optimize
import scipy.special

from keras_bandmf.accounting.round_loss import RoundLoss, SampledRound

_U = 2.0**-53
_NEGLIGIBLE = 1e-9  # the shares of delta that cut tails may take; they are charged
_FAR = 30.0  # a tilted sum leaves the window with probability exp(-30): costs accuracy, not safety
_VANISHING = 60.0  # powers of the spectrum below exp(-60) are taken as zero, and charged
_MAX_WINDOW = 2**22  # points of the discrete Fourier transform
_FINEST = 1e-14  # the least unit of a grid, in the largest loss on it: indices fit 64 bits
_LEAST_NOISE = 0.01  # below it, sampling is ignored: epsilon is that of taking part every time
_ROUGH = 1e-3  # the accuracy that tilts are tried at
_MAX_TILTS = 6
_LOG_ORDERS = (-12.0, 20.0)  # where tilts are looked for


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Returns the epsilon of one Gaussian mechanism of sensitivity 1.

    Formal guarantees: at least the exact value (Balle and Wang 2018, theorem 8), and above it by
    rounding only: the delta solved for is raised by more than the errors of the floating-point
    functions it is computed with, taken to be 10^-14 of logarithms.

    Args:
        sigma: The noise multiplier, above 0.
        delta: In (0, 1).

    Returns:
        Epsilon, at least 0.
    """

    def excess(epsilon: float) -> float:
        log_p = float(scipy.special.log_ndtr(0.5 / sigma - epsilon * sigma))
        log_q = float(scipy.special.log_ndtr(-0.5 / sigma - epsilon * sigma))
        slack = 1e-14 * (1.0 + abs(log_p) + abs(log_q) + epsilon)
        ratio = -math.expm1(min(epsilon + log_q - log_p, 0.0) - slack)
        return log_p + math.log(ratio) - math.log(delta)

    high = 0.5 / sigma**2 + math.sqrt(-2.0 * math.log(delta)) / sigma
    return _least(excess, 0.0, high * (1.0 + 1e-12))


def sampled_gaussian_epsilon(
    rounds: int, probability: float, sigma: float, delta: float, accuracy: float
) -> float:
    """Returns the epsilon of `rounds` Poisson-sampled Gaussian mechanisms of sensitivity 1.

    Formal guarantees: an upper bound under add-or-remove-one, by these steps.
     1. The pairs (q N(1, s^2) + (1-q) N(0, s^2), N(0, s^2)), and the same in the other order,
        dominate a round (Zhu, Dong and Wang 2022), and their compositions the run. Both orders
        are computed, and the larger epsilon returned.
     2. A round's privacy loss is moved to a grid: the mass of each interval goes to its two ends
        so that its integrals under both distributions stay ("connect the dots", Doroshenko et
        al. 2022). Every hockey-stick divergence can only grow. What rounding may move
        the other way is added to the upper end; tails go up, to the next point or to infinity.
     3. The grid's distribution is tilted by exp(lambda loss), with lambda where Chernoff's bound
        on delta is least, and composed by a Fourier transform. So even the smallest delta is
        computed to a relative accuracy. Loss beyond the transform's window is bounded by
        Chernoff and charged.
     4. Rounding errors of the transform (10 units in the last place times log2 of its length, in
        the norm) and of the power are bounded and charged.
    The constants of steps 2 and 4 are those of the floating-point functions, taken generously,
    not proved. The result is never above that of taking part in every round. Where rare large
    losses decide (rates below some 10^-5), no tilt suits, and what is charged for rounding can
    raise epsilon by some percent when delta is below 10^-9.

    Args:
        rounds: The number of mechanisms, at least 1.
        probability: The probability that an example takes part, in (0, 1].
        sigma: The noise multiplier, above 0.
        delta: In (0, 1).
        accuracy: The share of epsilon that the grid may cost, about; where the grid would be too
            large it costs more.

    Returns:
        Epsilon, at least 0.
    """
    everyone = gaussian_epsilon(sigma / math.sqrt(rounds), delta)
    if probability >= 1.0:
        return everyone
    # Even a round that publishes the example does so with this probability only.
    if -math.expm1(rounds * math.log1p(-probability)) * (1.0 + 1e-12) <= delta:
        return 0.0
    if sigma < _LEAST_NOISE or everyone == 0.0:
        return everyone
    mechanism = SampledRound(
        probability, sigma, math.sqrt(2 * math.log(rounds / (_NEGLIGIBLE * delta)))
    )
    unit = 0.05 * probability * min(1.0, 1.0 / sigma)
    unit = max(unit, _FINEST * mechanism.largest_loss)
    sketches = mechanism.on_grid(unit, 0.1, math.inf)
    directions = [_Direction(mechanism, i, sketches[i], rounds, delta) for i in (0, 1)]
    chernoff = [(*direction.chernoff(), direction) for direction in directions]
    coarse = max(accuracy, _ROUGH)
    epsilon = 0.0
    for bound, order, direction in sorted(chernoff, key=lambda each: -each[0]):
        if bound > epsilon:  # else the other order of the pair decides
            bound, order = direction.tried(bound, order, coarse)
        if bound > epsilon and accuracy < coarse:
            bound = direction.refined(bound, order, accuracy)
        epsilon = max(epsilon, bound)
    return float(min(epsilon, everyone))


@dataclasses.dataclass(frozen=True)
class _Direction:
    """The composed losses of one order of the pair; `sketch` is a round's, on a rough grid."""

    mechanism: SampledRound
    index: int
    sketch: RoundLoss
    rounds: int
    delta: float

    @property
    def infinite(self) -> float:
        """At least the probability of an infinite loss."""
        return self.rounds * math.exp(-(self.mechanism.reach**2) / 2)

    @property
    def factor(self) -> float:
        """What delta may be understated by, relatively: masses, tilt and their powers."""
        return math.exp(min(1e-9 + self.rounds * 4e-12, 700.0))

    def chernoff(self) -> tuple[float, float]:
        """Returns an upper bound on epsilon, and the order that gives it."""
        delta = (self.delta - self.infinite) / self.factor
        order, bound = _chernoff(self.sketch, self.rounds, delta)
        return max(bound, 0.0), order

    def tried(self, best: float, order: float, accuracy: float) -> tuple[float, float]:
        """Returns an upper bound on epsilon and the order of a good tilt, starting from Chernoff's.

        Chernoff's order suits most runs; where few large losses decide (tiny rates), the epsilon
        found shows a better one.
        """
        for _ in range(_MAX_TILTS):
            best = min(best, self.tilted(order, best, accuracy))
            if best <= 0.0:
                return 0.0, order
            before, order = order, _saddle(self.sketch, self.rounds, best)
            if abs(math.log(order / before)) < 0.25:
                break
        return best, order

    def refined(self, best: float, order: float, accuracy: float) -> float:
        """Returns an upper bound on epsilon; repeats while the grid was made for a larger one."""
        for _ in range(_MAX_TILTS):
            rough, best = best, min(best, self.tilted(order, best, accuracy))
            if best > 0.9 * rough or best == 0.0:
                break
        return best

    def tilted(self, order: float, rough: float, accuracy: float) -> float:
        """Returns an upper bound on epsilon, tilted by `order`, on a grid for one near `rough`."""
        rounds = self.rounds
        low, high, tail_order = _window(self.sketch, rounds, order, self.delta)
        high = max(high, rough)
        # Splitting the mass of an interval adds about a sixth of its square to the variance.
        unit = math.sqrt(12 * accuracy * rough / (rounds * (order + 1.0)))
        unit = max(min(unit, (high - low) / 64), (high - low) / (_MAX_WINDOW - 4))
        unit = max(unit, _FINEST * self.mechanism.largest_loss)
        growth = min(2 * math.sqrt(accuracy), 0.1)
        loss = self.mechanism.on_grid(unit, growth, 5 * growth / order)[self.index]
        sums = _Composed.of(loss, rounds, order, low, high)
        tail = math.exp(min(rounds * loss.log_moment(tail_order) - tail_order * sums.end, 700.0))

        def excess(epsilon: float) -> float:
            value = self.factor * (sums.delta(epsilon) + tail) + self.infinite
            return math.log(max(value, 1e-320)) - math.log(self.delta)

        start = max(0.0, sums.start)
        if excess(max(start, high)) > 0.0:
            return math.inf
        return _least(excess, start, max(start, high))


def _saddle(loss: RoundLoss, rounds: int, epsilon: float) -> float:
    """Returns the order at which Chernoff's bound on delta(epsilon) is least."""

    def bound(log_order: float) -> float:
        order = math.exp(log_order)
        peak = -order * math.log1p(1 / order) - math.log1p(order)
        return rounds * loss.log_moment(order) - order * epsilon + peak

    found = scipy.optimize.minimize_scalar(
        bound, bounds=_LOG_ORDERS, method="bounded", options={"xatol": 1e-3}
    )
    return math.exp(found.x)


def _chernoff(loss: RoundLoss, rounds: int, delta: float) -> tuple[float, float]:
    """Returns the order of the least Chernoff bound on epsilon, and that bound.

    For every order, delta(epsilon) <= E exp(order (X - epsilon)) max_t (1-e^-t) e^(-order t).
    """

    def bound(log_order: float) -> float:
        order = math.exp(log_order)
        peak = -order * math.log1p(1 / order) - math.log1p(order)
        return (rounds * loss.log_moment(order) - math.log(delta) + peak) / order

    found = scipy.optimize.minimize_scalar(
        bound, bounds=_LOG_ORDERS, method="bounded", options={"xatol": 1e-4}
    )
    return math.exp(found.x), float(found.fun)


def _window(loss: RoundLoss, rounds: int, order: float, delta: float) -> tuple[float, float, float]:
    """Returns the ends of a window for the tilted sum, and the order mu that bounds its tail.

    The sum is outside with a probability of exp(-30), and E exp(mu (X - high)) is small.

    A window too narrow costs accuracy, never safety.
    """
    base = loss.log_moment(order)
    weights = loss.tilted(order)
    values = loss.values
    mean = float(np.sum(weights * values))
    deviation = math.sqrt(max(rounds * float(np.sum(weights * (values - mean) ** 2)), 1e-300))

    def least(bound: Callable[[float], float], centre: float) -> tuple[float, float]:
        found = scipy.optimize.minimize_scalar(
            lambda log: bound(math.exp(log)),
            bounds=(math.log(centre) - 7, math.log(centre) + 7),
            method="bounded",
            options={"xatol": 1e-2},
        )
        return math.exp(found.x), float(found.fun)

    def above(step: float) -> float:
        return (_FAR + rounds * (loss.log_moment(order + step) - base)) / step

    def below(step: float) -> float:
        return (_FAR + rounds * (loss.log_moment(order - step) - base)) / step

    def tail(tail_order: float) -> float:
        spent = rounds * loss.log_moment(tail_order)
        return (spent - math.log(_NEGLIGIBLE * delta)) / tail_order

    steps = math.sqrt(2 * _FAR) / deviation
    tail_order, tail_end = least(tail, order)
    high = max(least(above, steps)[1], tail_end)
    return -least(below, steps)[1], high, tail_order


@dataclasses.dataclass(frozen=True)
class _Composed:
    """The tilted sum of the losses, on the grid points of a window, with a bound on its errors."""

    unit: float
    order: float
    log_scale: float  # of the tilt
    offset: int  # the first index of the window
    masses: np.ndarray
    each_error: float  # of every mass
    norm_error: float  # of all masses, in the Euclidean norm

    @property
    def start(self) -> float:
        return self.offset * self.unit

    @property
    def end(self) -> float:
        return (self.offset + len(self.masses)) * self.unit

    @classmethod
    def of(cls, loss: RoundLoss, rounds: int, order: float, low: float, high: float) -> _Composed:
        """Composes `rounds` losses tilted by `order`; sums outside the window wrap around."""
        offset = math.floor(low / loss.unit)
        size = scipy.fft.next_fast_len(math.ceil(high / loss.unit) - offset + 2, real=True)
        tilted = loss.tilted(order)
        spectrum = scipy.fft.rfft(np.bincount(loss.indices % size, tilted, size))
        transform = 10 * _U * math.log2(size)
        spectrum_error = transform * math.sqrt(size) * _norm(tilted)
        size_of = np.abs(spectrum)
        powers = np.zeros_like(spectrum)
        kept = size_of > math.exp(-_VANISHING / rounds)
        powers[kept] = np.exp(rounds * np.log(spectrum[kept]))
        masses = np.roll(scipy.fft.irfft(powers, size), -(offset % size))
        # |(F + d)^k - F^k| <= k |d| (|F| + |d|)^(k - 1), summed by Cauchy-Schwarz.
        largest = np.maximum(size_of, math.exp(-_VANISHING / rounds)) + spectrum_error
        slopes = np.exp((rounds - 1) * np.log(largest))
        each = rounds * spectrum_error * math.sqrt(2.0) * _norm(slopes) / size
        each += 2 * 16 * _U * rounds * float(np.sum(np.abs(powers))) / size
        each += math.exp(-_VANISHING + rounds * spectrum_error)
        norm = transform * _norm(masses)
        scale = rounds * loss.log_moment(order)
        return cls(loss.unit, order, scale, offset, masses, each, norm)

    def delta(self, epsilon: float) -> float:
        """Returns at least what the sums in the window contribute to delta."""
        begin = max(math.floor(epsilon / self.unit) + 1 - self.offset, 0)
        # Beyond, exp(-order * distance) is below exp(-60).
        reach = math.ceil(_VANISHING / (self.order * self.unit)) + 1
        end = min(begin + reach, len(self.masses))
        if begin >= len(self.masses):
            return 0.0
        distance = (np.arange(begin, end) + self.offset) * self.unit - epsilon
        weights = -np.expm1(-distance) * np.exp(-self.order * distance)
        # Not `@`: the threads of a matrix library cost more than these sums.
        value = float(np.sum(weights * self.masses[begin:end]))
        value += self.each_error * float(np.sum(weights))
        value += self.norm_error * _norm(weights) + 2 * math.exp(-_VANISHING)
        return math.exp(min(self.log_scale - self.order * epsilon, 700.0)) * max(value, 0.0)


def _norm(values: np.ndarray) -> float:
    return math.sqrt(float(np.sum(values * values)))


def _least(excess: Callable[[float], float], low: float, high: float) -> float:
    """Returns the least argument with excess <= 0, rounded up; excess(high) <= 0 is known."""
    if excess(low) <= 0.0:
        return low
    if excess(high) > 0.0:
        raise ArithmeticError(f"No epsilon up to {high} was found: excess {excess(high)}.")
    root = scipy.optimize.brentq(excess, low, high, xtol=1e-12 * high, rtol=1e-10)
    step = 1e-10 * root
    while excess(root) > 0.0:
        root, step = min(root + step, high), 2 * step
    return root * (1.0 + 1e-12)
