"""Certificates: true, close, confirmed from their seed, and refused when changed."""

import dataclasses
import functools

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution

from keras_bandmf.accounting.amplification.certificate import Certifier, OutOfReach
from keras_bandmf.accounting.amplification.concentration import factors
from keras_bandmf.accounting.amplification.estimator import Estimator
from keras_bandmf.sampling.patterns import AllocationInGroup, PoissonInGroup, Rounds

from . import reference


@pytest.fixture(scope="module")
def dp_sgd():
    """A run without secret groups, whose exact epsilon other accountants know."""
    law = PoissonInGroup(Rounds(20, 1), 0.1)
    return Certifier(Estimator(np.ones((20, 1)), law))


@functools.cache
def certified(certifier):
    return certifier.epsilon(1.0, 1e-4, 1.0)


def exact_delta(sigma, epsilon):
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=0.1, value_discretization_interval=1e-4
    ).self_compose(20)
    return loss.get_delta_for_epsilon(epsilon)


def test_a_certified_noise_multiplier_is_true_and_close(dp_sgd):
    found = dp_sgd.noise(2.0, 1e-5, 1.5)
    assert found.epsilon == 2.0 and found.bound <= found.delta == 1e-5
    assert found.failure == 1e-8
    assert exact_delta(found.sigma, 2.0) <= found.bound
    assert exact_delta(found.sigma * 0.98, 2.0) > 1e-5  # within two percent


def test_a_certified_epsilon_is_true_and_close(dp_sgd):
    found = certified(dp_sgd)
    assert found.sigma == 1.0
    assert exact_delta(1.0, found.epsilon) <= 1e-4 < exact_delta(1.0, found.epsilon * 0.97)
    # Anybody computes the same numbers again.
    assert dp_sgd.verify(found) == found


@pytest.mark.parametrize("change", [{"sigma": 0.9}, {"epsilon": 1.0}, {"delta": 1e-5}])
def test_a_changed_certificate_is_not_confirmed(dp_sgd, change):
    found = certified(dp_sgd)
    with pytest.raises(ValueError, match="not confirmed"):
        dp_sgd.verify(dataclasses.replace(found, **change))


class WorseAdd(Certifier):
    """The add direction estimates a delta that is above any target."""

    def _add(self, sigma, epsilon, samples, seed):
        moments, largest = super()._add(sigma, epsilon, samples, seed)
        mean, largest = moments.mean + 0.01, largest + 0.01
        log_sums = moments.samples * np.log1p(-factors(largest)[:, None] * mean)
        return moments._replace(mean=mean, log_sums=log_sums), largest


class WrongBound(Certifier):
    """The largest weight of the remove direction is not what it is said to be."""

    def _remove(self, sigma, epsilon, samples, seed):
        moments, largest = super()._remove(sigma, epsilon, samples, seed)
        return moments, 0.5 * min(largest, moments.largest[0])


def test_both_directions_are_certified(dp_sgd):
    certificate = certified(dp_sgd)
    with pytest.raises(ValueError, match="not confirmed"):
        WorseAdd(dp_sgd._estimator).verify(certificate)


def test_a_sample_above_its_proved_bound_ends_all(dp_sgd):
    certificate = certified(dp_sgd)
    with pytest.raises(RuntimeError, match="above its proved bound"):
        WrongBound(dp_sgd._estimator).verify(certificate)


def test_too_few_samples_are_out_of_reach():
    law = AllocationInGroup(Rounds(20, 1), 8)
    certifier = Certifier(Estimator(np.ones((20, 1)), law), max_samples=20_000)
    with pytest.raises(OutOfReach, match="samples"):
        certifier.noise(1.0, 1e-8, 3.0)


def test_a_run_may_be_certified_for_fewer_bands_of_noise_than_steps():
    # 240 steps, 11 bands: the plan of the quickstart, at square-root coefficients.
    law = PoissonInGroup(Rounds(240, 11), 11 * 25 / 1500)
    certifier = Certifier(Estimator(reference.square_root_columns(240, 11), law))
    assert certifier.noise(4.0, 1e-5, 1.3).sigma <= 1.12


@pytest.mark.slow
def test_random_allocation_certified():
    law = AllocationInGroup(Rounds(240, 12), 4)
    certifier = Certifier(Estimator(reference.square_root_columns(240, 12), law))
    assert certifier.noise(4.0, 1e-5, 1.1).sigma <= 0.96


def test_a_search_that_begins_with_too_little_noise_climbs():
    law = reference.law_of("allocation", 24, 4, 2)
    certifier = Certifier(Estimator(reference.square_root_columns(24, 4), law))
    # A fifth of what is needed.
    found = certifier.estimated_noise(2.0, 1e-4, 0.2)
    assert found == pytest.approx(certifier.estimated_noise(2.0, 1e-4, 1.0), rel=0.05)
