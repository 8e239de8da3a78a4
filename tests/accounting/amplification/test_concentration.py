"""Confidence bounds hold, and are no larger than they need to be."""

import math

import numpy as np
import pytest
import scipy.stats

from keras_bandmf.accounting.amplification.concentration import factors, upper_bound


def bound_of(samples, counts, largest, failure):
    """The bound of `counts` samples of each value."""
    gammas = factors(largest)[:, None]
    log_sums = np.sum(np.asarray(counts) * np.log1p(-gammas * np.asarray(samples)), axis=1)
    return upper_bound(int(np.sum(counts)), log_sums, largest, failure)


@pytest.mark.parametrize(
    "count,mean,failure", [(1000, 0.1, 1e-3), (100, 0.01, 0.05), (5000, 1e-3, 1e-4)]
)
def test_the_bound_of_coins_fails_as_seldom_as_stated(count, mean, failure):
    # Exact: the probability of all numbers of successes whose bound is below the mean.
    successes = np.arange(count + 1)
    fails = [bound_of([0, 1], [count - k, k], 1.0, failure) < mean for k in successes]
    assert scipy.stats.binom.pmf(successes, count, mean)[fails].sum() <= failure


def test_each_gamma_fails_as_seldom_as_its_share():
    # Of one gamma alone, with coins of which it is the best: not far below, and not above.
    count, mean, failure = 2000, 0.05, 1e-2
    successes = np.arange(count + 1)
    for gamma in factors(1.0):
        log_sums = successes * math.log1p(-gamma)
        bounds = -np.expm1((log_sums + math.log(failure / 4)) / count) / gamma
        missed = scipy.stats.binom.pmf(successes, count, mean)[bounds < mean].sum()
        assert missed <= failure / 4


@pytest.mark.parametrize("successes", [0, 1, 10, 100])
def test_it_is_above_the_exact_bound_of_coins_and_not_far(successes):
    found = bound_of([0, 1], [1000 - successes, successes], 1.0, 1e-6)
    exact = scipy.stats.beta.ppf(1 - 1e-6, successes + 1, 1000 - successes)
    assert exact <= found <= 1.3 * exact


def test_small_variances_pay():
    # The same mean: from samples that are 0 or B, and from samples far below B.
    count, mean, failure = 10**6, 1e-3, 1e-9
    wide = bound_of([0, 1], [999_000, 1000], 1.0, failure)
    narrow = bound_of([0, 2e-3], [500_000, 500_000], 1.0, failure)
    assert narrow - mean < 0.2 * (wide - mean)
    # No more than the largest gamma's share of the range.
    assert narrow - mean <= 1.1 * (math.log(4 / failure) / count / 0.9 + 0.45 * 1e-6)


def test_it_scales_with_the_range_and_ends_there():
    one = bound_of([0, 0.2], [500, 500], 1.0, 1e-3)
    np.testing.assert_allclose(bound_of([0, 2.0], [500, 500], 10.0, 1e-3), 10 * one)
    assert bound_of([0.99], [10], 1.0, 1e-9) <= 1.0
    assert bound_of([0.5], [10], math.inf, 1e-9) == math.inf
