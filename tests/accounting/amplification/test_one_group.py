"""The bound of the add direction in one group, against samples and exact divergences."""

import numpy as np
import pytest
import scipy.stats

from keras_bandmf.accounting.amplification import one_group
from keras_bandmf.accounting.amplification.certificate import Certifier
from keras_bandmf.accounting.amplification.estimator import Estimator
from keras_bandmf.accounting.amplification.one_group import add_bound

from . import reference


def bound_of(steps, participations, sigma, epsilon):
    return add_bound(reference.law_of("allocation", steps, 1, participations), sigma, epsilon)


@pytest.mark.parametrize(
    "steps, participations, sigma, epsilon",
    [(5, 1, 0.8, 0.7), (6, 2, 1.0, 0.7), (8, 3, 1.2, 0.5), (24, 2, 1.2, 1.0), (7, 7, 3.0, 0.5)],
)
def test_against_samples(steps, participations, sigma, epsilon):
    random = np.random.default_rng(1)
    u = np.exp(random.standard_normal((400_000, steps)) / sigma - 0.5 / sigma**2)
    blocks = np.array_split(np.arange(steps), participations)
    blocked = np.prod([u[:, block].mean(axis=1) for block in blocks], axis=0)
    # Exactly k of n, by the coefficients of a polynomial.
    coefficients = np.zeros((participations + 1, len(u)))
    coefficients[0] = 1.0
    for column in u.T:
        coefficients[1:] += column * coefficients[:-1]
    allocated = coefficients[-1] / scipy.special.comb(steps, participations)
    bound = bound_of(steps, participations, sigma, epsilon)
    for ratio, tight in ((blocked, True), (allocated, False)):
        samples = np.maximum(1.0 - np.exp(epsilon) * ratio, 0.0)
        mean, error = samples.mean(), samples.std() / np.sqrt(len(samples))
        # Five standard errors: it fails by chance with probability 3e-7.
        assert mean - 5 * error <= bound
        if tight:
            assert bound <= 1.002 * mean + 5 * error + 1e-11


@pytest.mark.parametrize("sigma, epsilon", [(1.0, 2.0), (0.5, 8.0), (3.0, 0.3)])
def test_of_one_step_it_is_that_of_a_gaussian(sigma, epsilon):
    cdf = scipy.stats.norm.cdf
    exact = cdf(0.5 / sigma - epsilon * sigma)
    exact -= np.exp(epsilon) * cdf(-0.5 / sigma - epsilon * sigma)
    # The grid of ratios is coarse where e^-epsilon is small.
    assert exact <= bound_of(1, 1, sigma, epsilon) <= 1.1 * exact + 1e-11


def test_it_is_at_most_one_and_falls_with_noise_and_epsilon():
    assert 0.99 < bound_of(10, 10, 0.05, 1.0) <= 1.0
    assert bound_of(10, 2, 1.0, 1.0) > bound_of(10, 2, 1.1, 1.0) > bound_of(10, 2, 1.1, 1.2)


def test_certificates_of_one_group_draw_no_samples_for_it():
    law = reference.law_of("allocation", 24, 1, 2)
    certifier = Certifier(Estimator(np.ones((24, 1)), law))
    found = certifier.noise(1.0, 1e-3, 1.0)
    assert found.samples[1] == 0 and certifier.verify(found) == found
    probabilities, vectors = reference.patterns("allocation", 24, 1, 2)
    deltas = reference.plain_deltas(np.eye(24), probabilities, vectors, found.sigma, 1.0, 60_000, 5)
    for mean, error in deltas:
        assert mean - 5 * error <= 1e-3
    with pytest.raises(ValueError, match="not confirmed"):
        certifier.verify(type(found)(**{**found.__dict__, "samples": (found.samples[0], 2**14)}))


def test_several_groups_are_refused():
    with pytest.raises(ValueError, match="Expected a law of one group"):
        add_bound(reference.law_of("allocation", 24, 2, 2), 1.0, 1.0)


@pytest.mark.parametrize("spread", [3.0, 300.0])
def test_fourier_transforms_are_off_by_less_than_their_bound(spread):
    points = np.arange(4_000)
    first = np.exp(-(((points - 900) / spread) ** 2))
    second = np.exp(-(((points - 1_300) / spread) ** 2))
    first, second = first / first.sum(), second / second.sum()
    values, off = one_group._convolved(
        one_group._Distribution(first, 0.0), one_group._Distribution(second, 1e-12)
    )
    # Sums of products that are not negative: exact to some units in the last place of each.
    assert np.abs(values - np.convolve(first, second)).sum() <= off - 1e-12
    assert 1e-12 < off < 2e-12


def test_what_transforms_may_hide_is_added():
    # The divergence is below 1e-100 there.
    law = reference.law_of("allocation", 24, 1, 2)
    product = one_group._power(one_group._log_mean(12, 5.0), 2, one_group._product)
    assert 0.0 < product.off <= add_bound(law, 5.0, 8.0) < 1e-9
