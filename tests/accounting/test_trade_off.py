"""Trade-off curves: against the exact curve of a Gaussian, on the safe side, ordered."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy.stats import norm

from keras_bandmf.accounting.composition import composed_epsilon
from keras_bandmf.accounting.trade_off import FALSE_POSITIVE_RATES, finite_noise, trade_off


def curve_of(*events, delta=1e-6):
    epsilon, _ = composed_epsilon(events, delta)
    return trade_off(events, epsilon, delta, finite_noise(delta, epsilon))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_a_gaussian_has_its_own_curve(sigma):
    curve, _ = curve_of((1, 1.0, sigma))
    assert curve.mu() == pytest.approx(1 / sigma, rel=1e-9) and curve.mu() >= 1 / sigma
    for rate in (*FALSE_POSITIVE_RATES, 0.0, 0.5, 0.99, 1.0):
        exact = norm.cdf(norm.ppf(rate) + 1 / sigma)
        assert exact <= curve.true_positive_rate(rate) <= exact * 1.02 + 1e-5


@pytest.mark.parametrize("event", [(900, 0.01, 0.8), (15, 0.2, 1.5)])
def test_a_sampled_gaussian_is_above_a_lower_bound_of_its_curve(event):
    rounds, rate, sigma = event
    curve, _ = curve_of(event)
    exact = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=1e-4
    ).self_compose(rounds)
    epsilons = np.linspace(0, 6, 601)
    deltas = np.array(exact.get_delta_for_epsilon(epsilons))
    for false in FALSE_POSITIVE_RATES:
        lines = np.minimum(
            np.exp(epsilons) * false + deltas, 1 - np.exp(-epsilons) * (1 - deltas - false)
        )
        theirs = lines.min()
        assert theirs * (1 - 1e-4) <= curve.true_positive_rate(false) <= theirs * 1.02
    for false in np.geomspace(1e-9, 0.999, 200):
        mu_curve = norm.cdf(norm.ppf(false) + curve.mu()) + curve.slack
        assert curve.true_positive_rate(false) <= mu_curve * (1 + 1e-6)


def test_the_finite_noise_is_charged():
    event, delta = (15, 0.2, 1.5), 1e-5
    epsilon, _ = composed_epsilon([event], delta)
    noise = finite_noise(delta, epsilon)
    assert noise * (1 + math.exp(epsilon)) == pytest.approx(1e-3 * delta, rel=1e-6)
    little, more = (dict(trade_off((event,), epsilon, delta, part)[1]) for part in (0.0, noise))
    assert more[delta] == little[delta] == epsilon
    assert all(more[each] > little[each] for each in more if each < delta)
    # What the finite noise would use up is left out.
    assert min(dict(trade_off((event,), epsilon, delta, 50 * noise)[1])) > min(more)


def test_every_pair_pays_for_the_finite_noise():
    """Against the exact delta of a Gaussian (Balle and Wang, arXiv 1805.06530)."""
    noise, delta = 1e-3, 0.01
    epsilon, _ = composed_epsilon([(1, 1.0, 1.0)], delta)
    curve, _ = trade_off(((1, 1.0, 1.0),), epsilon, delta, noise)
    others = [pair for pair in curve.pairs if pair != (epsilon, delta)]
    assert len(others) > 20
    for value, actual in others:
        exact = norm.cdf(0.5 - value) - math.exp(value) * norm.cdf(-0.5 - value)
        if value > 0:  # epsilon is above the exact one by a share of 10^-5 and less
            assert exact * (1 - 1e-3) + noise * (1 + math.exp(value)) <= actual


def test_a_better_pair_of_a_secret_group_counts():
    event, delta = (15, 0.2, 1.5), 1e-5
    epsilon, _ = composed_epsilon([event], delta)
    known, _ = trade_off((event,), epsilon, delta, 0.0)
    secret, epsilons = trade_off((event,), epsilon / 2, delta, 0.0)
    assert secret.true_positive_rate(0.001) < known.true_positive_rate(0.001)
    assert max(dict(epsilons)[each] for each in dict(epsilons) if each >= delta) == epsilon / 2


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_rates_are_probabilities(rate):
    curve, _ = curve_of((1, 1.0, 1.0))
    with pytest.raises(ValueError, match="false_positive_rate"):
        curve.true_positive_rate(rate)
