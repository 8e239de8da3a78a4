"""Epsilon of sampled Gaussians: never below the truth, and close to it."""

import importlib.util
import math
import pathlib

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_bandmf.accounting import sampled_gaussian
from keras_bandmf.accounting.accountant import (
    COARSE_ACCURACY,
    calibrate_noise,
    epsilon_of,
)
from keras_bandmf.accounting.sampled_gaussian import gaussian_epsilon, sampled_gaussian_epsilon
from keras_bandmf.sampling.schedule import Schedule


@pytest.fixture(scope="module")
def sweep():
    """The benchmark's independent formulas: no grid of losses, no transform."""
    path = pathlib.Path(__file__).parent.parent.parent / "benchmarks" / "accounting.py"
    spec = importlib.util.spec_from_file_location("accounting_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIGMAS = st.floats(math.log(0.05), math.log(1e4)).map(math.exp)
RATES = st.floats(math.log(1e-6), math.log(0.99)).map(math.exp)
DELTAS = st.floats(math.log(1e-14), math.log(1e-2)).map(math.exp)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIGMAS, st.floats(math.log(1e-30), math.log(0.3)).map(math.exp))
def test_a_gaussian_is_solved_from_above(sweep, sigma, delta):
    epsilon = gaussian_epsilon(sigma, delta)
    reached = sweep.gaussian_delta(sigma, epsilon)
    assert reached <= delta
    assert epsilon == 0.0 or reached >= delta * (1 - 1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(RATES, SIGMAS, DELTAS)
def test_one_round_by_the_closed_form(sweep, q, sigma, delta):
    epsilon = sampled_gaussian_epsilon(1, q, sigma, delta, 1e-5)
    reached = sweep.one_round_delta(q, sigma, epsilon)
    assert reached <= delta * (1 + 1e-9)
    # And not far above: by 3 % at the most extreme rates, more where delta is tiny as well.
    if epsilon > 1e-2 and delta > 1e-9:
        assert sweep.one_round_delta(q, sigma, 0.97 * epsilon) > delta


@pytest.mark.parametrize(
    ("rounds", "q", "sigma", "delta"),
    [
        (1000, 0.01, 0.9591, 1e-5),
        (1000, 0.01, 0.9591, 1e-14),
        (250, 0.04, 1.52876, 1e-40),
        (10**6, 1e-3, 0.8, 1e-12),
        (10**6, 1e-3, 1e6, 1e-9),  # Renyi accounting in floating point said 0
        (10**4, 0.9, 300.0, 1e-9),
        (60, 0.3, 2.0, 1e-6),
    ],
)
def test_compositions_by_a_contour_integral(sweep, rounds, q, sigma, delta):
    epsilon = sampled_gaussian_epsilon(rounds, q, sigma, delta, 1e-5)
    reached = sweep.integral_delta(q, sigma, rounds, epsilon)
    assert reached is not None
    assert delta * (1 - 5e-3) <= reached <= delta
    coarse = sampled_gaussian_epsilon(rounds, q, sigma, delta, 1e-2)
    assert epsilon <= coarse <= epsilon * 1.05


def test_the_integral_itself_agrees_with_a_gaussian(sweep):
    # Nearly everyone takes part in each of 400 rounds: sigma / 20.
    value = sweep.integral_delta(1 - 1e-12, 20.0, 400, 1.0)
    assert value == pytest.approx(sweep.gaussian_delta(1.0, 1.0), rel=1e-7)


def test_renyi_accounting_is_not_below_a_gaussian_again():
    # 10^6 rounds at rate 10^-3 and sigma 10^6: delta(0) is about 4e-7, so not (0, 1e-9)-private.
    run = Schedule("cyclic_poisson", 10**6, 1_000, 10**6, 1)
    limit = gaussian_epsilon(1e6 / (1e-3 * math.sqrt(10**6)), 1e-9)
    assert epsilon_of(run.dp_event(1e6), 1e-9) == pytest.approx(limit, rel=1e-3)


def test_random_plans(sweep, monkeypatch):
    """Sixty of the sweep's plans, coarse: no crash, each an upper bound by its formula."""
    monkeypatch.setattr(sweep, "optimistic_delta", lambda *args: None)  # takes seconds
    shorter = [i for i in range(90) if sweep.draw(11, i)[0].num_steps <= 10**5][:60]
    records = list(sweep.results(11, shorter, COARSE_ACCURACY))
    assert len(records) == 60
    assert not [record for record in records if not record["safe"]]
    checks = [record["check"] for record in records]
    assert min(checks.count("integral"), checks.count("Gaussian")) >= 10


@pytest.mark.parametrize("num_bands", [1, 2, 5, 7, 10, 14, 19])
def test_plans_that_dp_accounting_raised_for(sweep, num_bands):
    run = Schedule("cyclic_poisson", 5_000, 250, 200, num_bands)
    sigma = calibrate_noise(run, 10.0, 1e-5)
    epsilon = epsilon_of(run.dp_event(sigma), 1e-5)
    assert 10.0 * (1 - 1e-5) < epsilon <= 10.0
    assert sweep.check(run, sigma, epsilon)[1] <= 1e-5 * (1 - 1e-3)


@pytest.mark.parametrize("rounds", [3, 2_000, 10**6])
def test_the_errors_of_the_transform_are_bounded(rounds):
    """Masses, errors included, against binomial ones in 40 digits: a loss of one grid point."""
    q, order = 0.3 / math.sqrt(rounds), 0.7
    loss = sampled_gaussian.RoundLoss(0.5, np.array([0, 1]), np.array([1 - q, q]))
    mean = rounds * q * math.exp(order * 0.5) / (1 - q + q * math.exp(order * 0.5))
    low, high = max(0.0, mean - 12 * math.sqrt(mean) - 5), mean + 12 * math.sqrt(mean) + 40
    sums = sampled_gaussian._Composed.of(loss, rounds, order, 0.5 * low, 0.5 * high)
    with mpmath.workdps(40):
        p = mpmath.mpf(q) * mpmath.exp(mpmath.mpf(order) / 2)
        p, rest = p / (1 - mpmath.mpf(q) + p), (1 - mpmath.mpf(q)) / (1 - mpmath.mpf(q) + p)
        exact = [
            float(mpmath.binomial(rounds, k) * p**k * rest ** (rounds - k))
            if 0 <= k <= rounds
            else 0.0
            for k in range(sums.offset, sums.offset + len(sums.masses))
        ]
    off = np.abs(sums.masses - np.array(exact))
    assert off.max() <= sums.each_error + sums.norm_error
    assert sums.each_error < 1e-7 * max(exact)


def test_publishing_rarely_needs_no_noise():
    # Sampled at all with probability 10^-6: (0, 10^-5)-private even if published.
    assert sampled_gaussian_epsilon(100, 1e-8, 1e-5, 1e-5, 1e-5) == 0.0
    assert sampled_gaussian_epsilon(100, 1e-8, 1e-5, 1e-7, 1e-5) > 0.0
