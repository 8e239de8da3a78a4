"""The loss of a round on a grid: it dominates the exact loss, and not by much."""

import math

import mpmath
import numpy as np
import pytest

from keras_bandmf.accounting.round_loss import SampledRound


def exact_delta(q, sigma, epsilon, removes):
    """The hockey-stick divergence of the exact pair, by integration in 30 digits."""
    with mpmath.workdps(30):
        q, sigma, e = mpmath.mpf(q), mpmath.mpf(sigma), mpmath.exp(mpmath.mpf(epsilon))

        def mixture(x):
            return (1 - q) * mpmath.npdf(x, 0, sigma) + q * mpmath.npdf(x, 1, sigma)

        def mixture_tail(x):
            return (1 - q) * mpmath.ncdf(-x / sigma) + q * mpmath.ncdf((1 - x) / sigma)

        # The loss of removing exceeds epsilon above `x`, that of adding below it.
        ratio = ((e if removes else 1 / e) - (1 - q)) / q
        if ratio <= 0:
            return 1 - float(e) if removes else 0.0
        x = sigma**2 * mpmath.log(ratio) + 0.5
        if removes:
            return float(mixture_tail(x) - e * mpmath.ncdf(-x / sigma))
        return float(mpmath.ncdf(x / sigma) - e * (1 - mixture_tail(x)))


@pytest.mark.parametrize(
    ("q", "sigma"), [(0.01, 1.0), (0.5, 0.05), (1e-6, 0.3), (0.999, 50.0), (1e-3, 1e4), (0.3, 0.01)]
)
@pytest.mark.parametrize(("unit", "growth"), [(0.002, 0.01), (0.3, 0.1)])
def test_it_dominates_the_exact_loss(q, sigma, unit, growth):
    reach = 9.0
    infinite = math.exp(-(reach**2) / 2)
    scale = q * min(1.0, 1 / sigma)
    mechanism = SampledRound(q, sigma, reach)
    unit = max(unit * max(1.0, math.log1p(mechanism.largest_loss)) * scale**0.5 * 0.1, 1e-9)
    for removes, loss in zip((True, False), mechanism.on_grid(unit, growth, 5.0), strict=True):
        assert loss.masses.min() >= 0
        assert loss.masses.sum() == pytest.approx(1.0, abs=1e-12 + infinite)
        largest = min(float(loss.values.max()), 50.0)
        for epsilon in (0.0, scale * 0.1, scale, 0.1 * largest, 0.5 * largest, 0.9 * largest):
            over = -np.expm1(np.minimum(epsilon - loss.values, 0.0))
            found = float(loss.masses @ over)
            exact = exact_delta(q, sigma, epsilon, removes)
            assert exact <= found * (1 + 1e-11) + infinite
            # Connected dots: no more than the loss at the dots themselves.
            assert found <= exact * 1.3 + unit * 2 + 2 * infinite


def test_moments_are_those_of_an_integral():
    q, sigma, order = 0.02, 0.9, 3.0
    remove, add = SampledRound(q, sigma, 12.0).on_grid(1e-4, 1e-3, 1e-2)
    with mpmath.workdps(30):

        def plain(x):
            return mpmath.npdf(x, 0, sigma)

        def ratio(x):
            return 1 - q + q * mpmath.exp((2 * x - 1) / (2 * mpmath.mpf(sigma) ** 2))

        points = [-12, -2, 0, 1, 2, 4, 8, 16]
        removed = mpmath.log(mpmath.quad(lambda x: plain(x) * ratio(x) ** (order + 1), points))
        added = mpmath.log(mpmath.quad(lambda x: plain(x) * ratio(x) ** -order, points))
    assert float(removed) <= remove.log_moment(order) <= float(removed) * (1 + 1e-4)
    assert float(added) <= add.log_moment(order) <= float(added) * (1 + 1e-4)
    assert remove.tilted(order).sum() == pytest.approx(1.0, abs=1e-12)
