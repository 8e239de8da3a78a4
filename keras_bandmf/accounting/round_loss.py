"""The privacy loss of one Poisson-sampled Gaussian mechanism, on a grid, on the safe side."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

_MAX_BUCKETS = 20_000  # intervals of the grid
# The integrands are analytic far beyond the pieces integrated: 8 nodes are exact to 1e-15.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclasses.dataclass(frozen=True)
class RoundLoss:
    """The loss of a round: `masses` at `indices * unit`; the mass at infinity is kept elsewhere."""

    unit: float
    indices: np.ndarray
    masses: np.ndarray

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The losses."""
        return self.unit * self.indices

    @functools.cached_property
    def log_masses(self) -> np.ndarray:
        """Logarithms of the masses; -inf for none."""
        with np.errstate(divide="ignore"):
            return np.log(self.masses)

    def log_moment(self, order: float) -> float:
        """Returns log E exp(order * loss)."""
        terms = self.log_masses + order * self.values
        largest = float(terms.max())
        return largest + math.log(float(np.exp(terms - largest).sum()))

    def tilted(self, order: float) -> np.ndarray:
        """Returns the masses times exp(order * loss), scaled to sum 1."""
        return np.exp(self.log_masses + order * self.values - self.log_moment(order))


@dataclasses.dataclass(frozen=True)
class SampledRound:
    """A Poisson-sampled Gaussian, looked at up to `reach` standard deviations from its means.

    Formal guarantees: see `on_grid`. Functions of NumPy and SciPy are taken to be exact to 10
    units in the last place; what is added for that (`slack` below) is generous, not proved.

    Attributes:
        probability: The sampling probability q, in (0, 1).
        sigma: The noise multiplier.
        reach: Where to stop, in standard deviations; outputs further out have a probability of at
            most exp(-reach^2 / 2) on each side.
    """

    probability: float
    sigma: float
    reach: float

    def loss(self, x: np.ndarray) -> np.ndarray:
        """Returns the log of the ratio of densities, mixture over plain, at the outputs `x`."""
        exponent = (2 * x - 1) / (2 * self.sigma**2)
        return np.logaddexp(math.log1p(-self.probability), math.log(self.probability) + exponent)

    @property
    def largest_loss(self) -> float:
        """The largest loss within reach, of removing the example or of adding it."""
        ends = np.array([-self.reach * self.sigma, 1.0 + self.reach * self.sigma])
        return float(np.abs(self.loss(ends)).max())

    def output(self, loss: np.ndarray) -> np.ndarray:
        """Returns the output of that loss; -inf for a loss that no output has."""
        q = self.probability
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            small = np.log(np.maximum(np.expm1(np.minimum(loss, 1.0)) + q, 0.0))
            large = loss + np.log1p(-(1 - q) * np.exp(-np.maximum(loss, 1.0)))
        log_excess = np.where(loss < 1.0, small, large)
        return self.sigma**2 * (log_excess - math.log(q)) + 0.5

    def on_grid(self, unit: float, growth: float, widest: float) -> tuple[RoundLoss, RoundLoss]:
        """Returns the losses of the pairs (mixture, plain) and (plain, mixture), on grids.

        Formal guarantees: with an infinite loss of probability exp(-reach^2 / 2) added, each
        dominates the exact loss: its hockey-stick divergences are at least the exact ones. The
        mass of an interval goes to both its ends so that its integrals under both distributions
        stay; more goes to the upper end for rounding; outputs below the reach count as the upper
        end of the lowest interval, those above as infinite.

        Args:
            unit: The width of intervals near 0; every loss is a multiple of it.
            growth: Further out, the width of an interval is at most about this share of its loss,
                as far as the number of intervals allows.
            widest: The largest width of an interval, as far as their number allows.

        Returns:
            The losses of removing the example, and of adding it.
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
        return RoundLoss(unit, indices, remove), RoundLoss(unit, -indices, add)

    def _nodes(self, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the nodes and weights of Gauss-Legendre quadrature, after their buckets."""
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
    """Returns whole numbers from first to last: all near 0, then growing steps up to `widest`."""
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
