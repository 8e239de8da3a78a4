"""Confidence bounds hold, and are no larger than they need to be."""

import math

import numpy as np
import pytest
import scipy.stats

from keras_bandmf.accounting.amplification.concentration import upper_bound


@pytest.mark.parametrize("count,mean,failure", [(1000, 0.1, 1e-3), (100, 0.01, 0.05)])
def test_the_bound_of_coins_fails_as_seldom_as_stated(count, mean, failure):
    # Exact: the probability of all numbers of successes whose bound is below the mean.
    successes = np.arange(count + 1)
    shares = successes / count
    variances = shares * (1 - shares) * count / (count - 1)
    fails = [
        upper_bound(count, s, v, 1.0, failure) < mean
        for s, v in zip(shares, variances, strict=True)
    ]
    assert scipy.stats.binom.pmf(successes, count, mean)[fails].sum() <= failure


@pytest.mark.parametrize("successes", [0, 1, 10, 500, 1000])
def test_it_is_above_the_exact_bound_of_coins_and_not_far(successes):
    share = successes / 1000
    found = upper_bound(1000, share, share * (1 - share) * 1000 / 999, 1.0, 1e-6)
    exact = scipy.stats.beta.ppf(1 - 1e-6, successes + 1, max(1000 - successes, 1e-9))
    assert min(exact, 1.0) <= found <= 1.15 * exact + 1e-12


def test_small_variances_pay():
    wide = upper_bound(10**6, 1e-3, 1e-3, 1.0, 1e-9)
    narrow = upper_bound(10**6, 1e-3, 1e-6, 1.0, 1e-9)
    assert narrow < wide
    log = math.log(4e9)
    expected = 1e-3 + math.sqrt(2e-6 * log / 10**6) + 7 * log / 3 / (10**6 - 1)
    np.testing.assert_allclose(narrow, expected)


def test_it_scales_with_the_range_and_ends_there():
    one = upper_bound(1000, 0.2, 0.01, 1.0, 1e-3)
    np.testing.assert_allclose(upper_bound(1000, 2.0, 1.0, 10.0, 1e-3), 10 * one)
    assert upper_bound(10, 0.99, 0.0, 1.0, 1e-9) <= 1.0
