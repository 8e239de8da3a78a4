"""The proposals are probability laws: their norms by quadrature, and weights of mean 1."""

import numpy as np
import pytest
import scipy.stats

from keras_bandmf.accounting.amplification import proposals
from keras_bandmf.accounting.amplification.estimator import Estimator, OutOfReach

from . import reference
from .reference import law_of

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(100)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@pytest.mark.parametrize("case", [("poisson", 11, 3, 0.3), ("allocation", 11, 3, 2)])
@pytest.mark.parametrize("power", [1, 2, 5])
def test_norms_and_mixtures_of_a_tilt(case, power):
    sigma, q, law = 1.2, 0.3, law_of(*case)
    tilt = proposals.tilt(law, sigma, power, q)
    u = np.exp(NODES / sigma - 0.5 / sigma**2)
    h = (1 - q + q * u) ** power
    chosen, others = np.sum(WEIGHTS * u * h), np.sum(WEIGHTS * h)
    rounds = law.rounds.of_group()
    if case[0] == "poisson":
        expected = rounds * np.log(q * chosen + (1 - q) * others)
        share = q * chosen / (q * chosen + (1 - q) * others)
        np.testing.assert_allclose(tilt.inclusion, share, rtol=1e-12)
    else:
        expected = 2 * np.log(chosen) + (rounds - 2) * np.log(others)
    np.testing.assert_allclose(tilt.log_norms, expected, rtol=1e-10)
    multiples = np.arange(power + 1)
    for weighted, found in ((u * h, 1 + multiples @ tilt.chosen), (h, multiples @ tilt.others)):
        mean = np.sum(WEIGHTS * weighted * NODES) / np.sum(WEIGHTS * weighted)
        np.testing.assert_allclose(found / sigma, mean, rtol=1e-10)


@pytest.mark.parametrize("power", [0.5, 6.0, 40.0])
def test_what_a_dip_accepts(power):
    sigma, q = 1.2, 0.3
    u = np.exp(NODES / sigma - 0.5 / sigma**2)
    chance = proposals.acceptance(q, sigma, power)
    expected = np.sum(WEIGHTS * ((1 - q) / (1 - q + q * u)) ** power)
    np.testing.assert_allclose(chance, expected, rtol=1e-6)


# At epsilon = -40 every sample counts whole: the mean is the mass of P or Q, which is 1. Four
# standard errors fail by chance with probability 6e-5 each.
@pytest.mark.parametrize("case", [("poisson", 7, 3, 0.3), ("allocation", 7, 3, 2)])
def test_weights_of_all_samples_have_mean_one(case):
    law, sigma = law_of(*case), 1.5
    estimator = Estimator(reference.square_root_columns(*case[1:3]), law)
    found = [
        estimator.remove(sigma, -40.0, proposals.tilt(law, sigma, power, 0.3), 60_000, 7)
        for power in (1, 2)
    ]
    found.append(estimator.shift(sigma, -40.0, 1.0, 60_000, 7))
    if case[0] == "poisson":
        # A power of which a third of the normals is accepted by no try.
        power = 25.0
        chance = proposals.acceptance(0.3, sigma, power)
        rest = (1 - chance) ** proposals.TRIES
        assert 0.1 < rest < 0.9
        dip = proposals.Dip(power, (1 - rest) / chance, rest)
        found.append(estimator.dip(sigma, -40.0, dip, 60_000, 7))
    for moments in found:
        error = np.sqrt(moments.variance[0] / moments.samples)
        assert error < 0.02
        assert abs(moments.mean[0] - 1.0) < 4 * error


def test_the_shift_of_one_gaussian_is_as_tight_as_its_bound():
    # One participation in one step: Jensen's inequality is an equality, and all is known.
    law, sigma, epsilon = law_of("allocation", 1, 1, 1), 1.0, 4.0
    estimator = Estimator(np.ones((1, 1)), law)
    tilt, bound = proposals.best_shift(
        estimator.mean_square, estimator.expected_participations, sigma, epsilon
    )
    # Here log L = s - 1/2 = (s - limit) - epsilon, so the bound is attained at some distance.
    limit = 0.5 - epsilon
    room = scipy.stats.norm.cdf(limit + tilt)
    distance = np.linspace(0.0, 5.0, 50_001)
    weights = -np.expm1(-distance) * np.exp(tilt * (limit - distance) + tilt**2 / 2) * room
    np.testing.assert_allclose(bound, np.max(weights), rtol=1e-6)
    found = estimator.shift(sigma, epsilon, tilt, 50_000, 3)
    np.testing.assert_allclose(found.largest[0], bound, rtol=1e-3)
    assert found.largest[0] <= bound
    exact = scipy.stats.norm.cdf(0.5 - epsilon) - np.exp(epsilon) * scipy.stats.norm.cdf(
        -0.5 - epsilon
    )
    error = np.sqrt(found.variance[0] / found.samples)
    assert abs(found.mean[0] - exact) < 4 * error


@pytest.mark.parametrize("epsilon", [4.0, 8.0, 15.5, 18.0, 30.0])
def test_a_shift_far_in_the_tail_loses_no_samples(epsilon):
    # Compiled by XLA, the quantile function has no lower tail: no proposal may need it.
    estimator = Estimator(np.ones((1, 1)), law_of("poisson", 1, 1, 1.0))
    tilt, bound = proposals.best_shift(1.0, 1.0, 1.0, epsilon)
    found = estimator.shift(1.0, epsilon, tilt, 2**16, 5, bound)
    log_far = scipy.stats.norm.logcdf(-0.5 - epsilon)
    exact = scipy.stats.norm.cdf(0.5 - epsilon) - np.exp(epsilon + log_far)
    error = np.sqrt(found.variance[0] / found.samples)
    # Its square may be too small for float64.
    assert abs(found.mean[0] - exact) < 4 * error if error else found.mean[0] <= bound
    assert found.mean[0] == pytest.approx(exact, rel=0.02)
    assert proposals.shift(1.0, 1.0, 1.0, epsilon, tilt).room > 1e-3


def test_a_lost_sample_is_an_error():
    estimator = Estimator(np.ones((1, 1)), law_of("poisson", 1, 1, 1.0))
    with pytest.raises(OutOfReach, match="range of float64"):
        estimator.shift(1.0, 30.0, 0.5, 1_000, 5)
