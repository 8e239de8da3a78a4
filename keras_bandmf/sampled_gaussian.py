"""Upper bounds on epsilon: the Gaussian mechanism, and compositions of Poisson-sampled ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.fft
import scipy.optimize
import scipy.special

_U = 2.0**-53
_NEGLIGIBLE = 1e-9  # the shares of delta that cut tails may take; they are charged
_FAR = 30.0  # a tilted sum leaves the window with probability exp(-30): costs accuracy, not safety
_VANISHING = 60.0  # powers of the spectrum below exp(-60) are taken as zero, and charged
_MAX_WINDOW = 2**22  # points of the discrete Fourier transform
_MAX_BUCKETS = 20_000  # of a round's loss
_LEAST_NOISE = 0.01  # below it, sampling is ignored: epsilon is that of taking part every time
_ROUGH = 1e-3  # the accuracy that tilts are tried at
_MAX_TILTS = 6
_LOG_ORDERS = (-12.0, 20.0)  # where tilts are looked for
# Nodes a unit interval; the integrands are analytic far beyond, so 8 nodes are exact to 1e-15.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism of sensitivity 1.

    Formal guarantees: at least the exact value (Balle and Wang 2018, theorem 8), and above it by
    rounding only: the delta solved for is raised by more than the errors of the floating-point
    functions it is computed with, taken to be 10^-14 of logarithms.

    Args:
        sigma: the noise multiplier, above 0.
        delta: in (0, 1).

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
    """Epsilon of `rounds` Poisson-sampled Gaussian mechanisms of sensitivity 1.

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
    not proved. The result is never above that of taking part in every round.

    Args:
        rounds: at least 1.
        probability: of an example to take part, in (0, 1].
        sigma: the noise multiplier, above 0.
        delta: in (0, 1).
        accuracy: how much of epsilon the grid may cost, about; where the grid would be too large
            it costs more.

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
    mechanism = _Round(probability, sigma, math.sqrt(2 * math.log(rounds / (_NEGLIGIBLE * delta))))
    unit = 0.05 * probability * min(1.0, 1.0 / sigma)
    sketches = mechanism.on_grid(unit, 0.1, math.inf)
    directions = [_Direction(mechanism, i, sketches[i], rounds, delta) for i in (0, 1)]
    chernoff = [(*direction.chernoff(), direction) for direction in directions]
    coarse = max(accuracy, _ROUGH)
    epsilon = 0.0
    for bound, order, direction in sorted(chernoff, key=lambda each: -each[0]):
        if bound > epsilon:  # else the other order of the pair decides
            bound, order = direction.tried(bound, order, coarse)
        if bound > epsilon and accuracy < coarse:
            bound = min(bound, direction.tilted(order, bound, accuracy))
        epsilon = max(epsilon, bound)
    return float(min(epsilon, everyone))


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss of a round: `masses` at `indices * unit`, and some mass at infinity, apart."""

    unit: float
    indices: np.ndarray
    masses: np.ndarray

    def log_moment(self, order: float) -> float:
        """log E exp(order * loss)."""
        return float(scipy.special.logsumexp(order * self.unit * self.indices, b=self.masses))

    def tilted(self, order: float) -> np.ndarray:
        """The masses times exp(order * loss), scaled to sum 1."""
        with np.errstate(divide="ignore"):
            logs = np.log(self.masses) + order * self.unit * self.indices
        return np.exp(logs - self.log_moment(order))


@dataclasses.dataclass(frozen=True)
class _Round:
    """A Poisson-sampled Gaussian, looked at up to `reach` standard deviations from its means."""

    probability: float
    sigma: float
    reach: float

    def loss(self, x: np.ndarray) -> np.ndarray:
        """log of the ratio of densities, mixture over plain, at the outputs `x`."""
        exponent = (2 * x - 1) / (2 * self.sigma**2)
        return np.logaddexp(math.log1p(-self.probability), math.log(self.probability) + exponent)

    def output(self, loss: np.ndarray) -> np.ndarray:
        """The output of that loss; -inf for a loss that no output has."""
        q = self.probability
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            small = np.log(np.maximum(np.expm1(np.minimum(loss, 1.0)) + q, 0.0))
            large = loss + np.log1p(-(1 - q) * np.exp(-np.maximum(loss, 1.0)))
        log_excess = np.where(loss < 1.0, small, large)
        return self.sigma**2 * (log_excess - math.log(q)) + 0.5

    def on_grid(self, unit: float, growth: float, widest: float) -> tuple[_Loss, _Loss]:
        """The loss of adding the example, reversed, and of removing it: (remove, add).

        Intervals are `unit` wide near 0 and up to `growth` of the loss, or `widest`, further out.
        """
        x_low, x_high = -self.reach * self.sigma, 1.0 + self.reach * self.sigma
        first, last = self.loss(np.array([x_low, x_high])) / unit
        indices = _grid(math.floor(first), math.ceil(last), growth, widest / unit)
        edges = indices * unit
        cuts = np.clip(self.output(edges), x_low, x_high)
        cuts[0], cuts[-1] = x_low, x_high
        bucket, x, weight = self._nodes(cuts)
        loss = self.loss(x)
        log_plain = -0.5 * (x / self.sigma) ** 2 - math.log(self.sigma * math.sqrt(2 * math.pi))
        width = np.diff(edges)
        size = np.maximum(np.abs(edges[:-1]), np.abs(edges[1:]))
        rounding = size + abs(math.log(self.probability)) + 1.0
        slack = 1e-14 * rounding * (self.probability + size) / width
        beyond = 0.5 * math.exp(-(self.reach**2) / 2)  # at least the plain mass on each side
        halves = []
        for log_density, above in (
            (log_plain + loss, loss - edges[bucket]),
            (log_plain, edges[bucket + 1] - loss),
        ):
            density = weight * np.exp(log_density)
            share = np.expm1(-np.clip(above, 0.0, width[bucket])) / np.expm1(-width[bucket])
            whole = np.bincount(bucket, density, len(width))
            upper = np.minimum(np.bincount(bucket, density * share, len(width)), whole)
            upper = np.minimum(upper + whole * slack, whole)
            halves.append((whole - upper, upper))
        (low, up), (other_low, other_up) = halves
        up[0] += beyond
        other_up[-1] += beyond
        remove, add = np.zeros((2, len(indices)))
        remove[:-1] += low
        remove[1:] += up
        add[1:] += other_low
        add[:-1] += other_up
        return _Loss(unit, indices, remove), _Loss(unit, -indices, add)

    def _nodes(self, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nodes and weights of Gauss-Legendre quadrature between the cuts, and their bucket."""
        longest = 0.5 * min(self.sigma, self.sigma**2)
        lengths = np.diff(cuts)
        pieces = np.maximum(np.ceil(lengths / longest), 1).astype(np.int64)
        bucket = np.repeat(np.arange(len(lengths)), pieces)
        place = np.arange(len(bucket)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        half = (lengths / pieces)[bucket] / 2
        middle = cuts[:-1][bucket] + (2 * place + 1) * half
        x = middle[:, None] + half[:, None] * _NODES
        weight = half[:, None] * _WEIGHTS
        return np.repeat(bucket, len(_NODES)), x.ravel(), weight.ravel()


def _grid(first: int, last: int, growth: float, widest: float) -> np.ndarray:
    """Whole numbers from first to last: all near 0, then growing steps of `widest` at most."""
    last = max(last, first + 1)
    widest = max(widest, (last - first) / _MAX_BUCKETS, 1.0)

    def side(end: int) -> np.ndarray:
        dense = math.ceil(1 / growth)
        turn = max(min(widest / growth, end), dense)
        count = max(2, math.ceil(math.log(max(turn / dense, 1.0)) / math.log1p(growth)) + 1)
        parts = [
            np.arange(dense + 1),
            np.geomspace(dense, turn, count),
            np.arange(turn, end, widest),
        ]
        return np.round(np.concatenate(parts)).astype(np.int64)

    values = np.concatenate([-side(max(-first, 1)), side(max(last, 1)), [first, last]])
    return np.unique(values[(values >= first) & (values <= last)])


@dataclasses.dataclass(frozen=True)
class _Direction:
    """The composed losses of one order of the pair; `sketch` is a round's, on a rough grid."""

    mechanism: _Round
    index: int
    sketch: _Loss
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
        """(an upper bound on epsilon, the order that gives it)."""
        delta = (self.delta - self.infinite) / self.factor
        order, bound = _chernoff(self.sketch, self.rounds, delta)
        return max(bound, 0.0), order

    def tried(self, best: float, order: float, accuracy: float) -> tuple[float, float]:
        """(an upper bound on epsilon, the order of a good tilt), from Chernoff's.

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

    def tilted(self, order: float, rough: float, accuracy: float) -> float:
        """An upper bound on epsilon, tilted by `order`, on a grid for an epsilon near `rough`."""
        rounds = self.rounds
        low, high, tail_order = _window(self.sketch, rounds, order, self.delta)
        high = max(high, rough)
        # Splitting the mass of an interval adds about a sixth of its square to the variance.
        unit = math.sqrt(12 * accuracy * rough / (rounds * (order + 1.0)))
        unit = max(min(unit, (high - low) / 64), (high - low) / (_MAX_WINDOW - 4))
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


def _saddle(loss: _Loss, rounds: int, epsilon: float) -> float:
    """The order at which Chernoff's bound on delta(epsilon) is least."""

    def bound(log_order: float) -> float:
        order = math.exp(log_order)
        peak = -order * math.log1p(1 / order) - math.log1p(order)
        return rounds * loss.log_moment(order) - order * epsilon + peak

    found = scipy.optimize.minimize_scalar(
        bound, bounds=_LOG_ORDERS, method="bounded", options={"xatol": 1e-3}
    )
    return math.exp(found.x)


def _chernoff(loss: _Loss, rounds: int, delta: float) -> tuple[float, float]:
    """(order, epsilon): delta(epsilon) <= E exp(order (X - epsilon)) max_t (1-e^-t) e^(-order t).

    Valid for every order; the order of the least epsilon is returned.
    """

    def bound(log_order: float) -> float:
        order = math.exp(log_order)
        peak = -order * math.log1p(1 / order) - math.log1p(order)
        return (rounds * loss.log_moment(order) - math.log(delta) + peak) / order

    found = scipy.optimize.minimize_scalar(
        bound, bounds=_LOG_ORDERS, method="bounded", options={"xatol": 1e-4}
    )
    return math.exp(found.x), float(found.fun)


def _window(loss: _Loss, rounds: int, order: float, delta: float) -> tuple[float, float, float]:
    """(low, high, mu): the tilted sum is in between but for exp(-30); E exp(mu (X - high)) small.

    A window too narrow costs accuracy, never safety.
    """
    base = loss.log_moment(order)
    weights = loss.tilted(order)
    values = loss.unit * loss.indices
    mean = float(weights @ values)
    deviation = math.sqrt(max(rounds * float(weights @ (values - mean) ** 2), 1e-300))

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
    def of(cls, loss: _Loss, rounds: int, order: float, low: float, high: float) -> _Composed:
        """Composes `rounds` losses tilted by `order`; sums outside the window wrap around."""
        offset = math.floor(low / loss.unit)
        size = scipy.fft.next_fast_len(math.ceil(high / loss.unit) - offset + 2, real=True)
        tilted = loss.tilted(order)
        spectrum = scipy.fft.rfft(np.bincount(loss.indices % size, tilted, size))
        transform = 10 * _U * math.log2(size)
        spectrum_error = transform * math.sqrt(size) * float(np.linalg.norm(tilted))
        size_of = np.abs(spectrum)
        powers = np.zeros_like(spectrum)
        kept = size_of > math.exp(-_VANISHING / rounds)
        powers[kept] = np.exp(rounds * np.log(spectrum[kept]))
        masses = np.roll(scipy.fft.irfft(powers, size), -(offset % size))
        # |(F + d)^k - F^k| <= k |d| (|F| + |d|)^(k - 1), summed by Cauchy-Schwarz.
        largest = np.maximum(size_of, math.exp(-_VANISHING / rounds)) + spectrum_error
        slopes = np.exp((rounds - 1) * np.log(largest))
        each = rounds * spectrum_error * math.sqrt(2.0) * float(np.linalg.norm(slopes)) / size
        each += 2 * 16 * _U * rounds * float(np.sum(np.abs(powers))) / size
        each += math.exp(-_VANISHING + rounds * spectrum_error)
        norm = transform * float(np.linalg.norm(masses))
        scale = rounds * loss.log_moment(order)
        return cls(loss.unit, order, scale, offset, masses, each, norm)

    def delta(self, epsilon: float) -> float:
        """At least the part of delta(epsilon) that comes from sums in the window."""
        begin = max(math.floor(epsilon / self.unit) + 1 - self.offset, 0)
        # Beyond, exp(-order * distance) is below exp(-60).
        reach = math.ceil(_VANISHING / (self.order * self.unit)) + 1
        end = min(begin + reach, len(self.masses))
        if begin >= len(self.masses):
            return 0.0
        distance = (np.arange(begin, end) + self.offset) * self.unit - epsilon
        weights = -np.expm1(-distance) * np.exp(-self.order * distance)
        value = float(weights @ self.masses[begin:end])
        value += self.each_error * float(np.sum(weights))
        value += self.norm_error * float(np.linalg.norm(weights)) + 2 * math.exp(-_VANISHING)
        return math.exp(min(self.log_scale - self.order * epsilon, 700.0)) * max(value, 0.0)


def _least(excess: Callable[[float], float], low: float, high: float) -> float:
    """The least argument with excess <= 0, rounded up; excess(high) <= 0 is known."""
    if excess(low) <= 0.0:
        return low
    if excess(high) > 0.0:
        raise ArithmeticError(f"No epsilon up to {high} was found: excess {excess(high)}.")
    root = scipy.optimize.brentq(excess, low, high, xtol=1e-12 * high, rtol=1e-10)
    step = 1e-10 * root
    while excess(root) > 0.0:
        root, step = min(root + step, high), 2 * step
    return root * (1.0 + 1e-12)
