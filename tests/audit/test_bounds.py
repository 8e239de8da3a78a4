"""Lower bounds hold for mechanisms whose epsilon is known, at the stated rate of false alarms."""

import math

import numpy as np
import pytest
import scipy.stats

from keras_bandmf.audit import bounds


def halves(scores):
    return [scores[: len(scores) // 2]], [scores[len(scores) // 2 :]]


def trials_of_gaussian(rng, mu, count):
    """Independent trials of a test of N(mu, 1) against N(0, 1)."""
    chosen_in, counted_in = halves(mu + rng.normal(size=count))
    chosen_out, counted_out = halves(rng.normal(size=count))
    return bounds.Trials(chosen_in, chosen_out, counted_in, counted_out)


def delta_of_gaussian(mu, epsilon):
    """The exact delta of a Gaussian mechanism (Balle and Wang, arXiv 1805.06530)."""
    first = scipy.stats.norm.cdf(mu / 2 - epsilon / mu)
    return first - math.exp(epsilon) * scipy.stats.norm.cdf(-mu / 2 - epsilon / mu)


def test_trials_of_a_gaussian_mechanism_are_below_its_epsilon():
    """At 80 % confidence, 400 bounds may be false 80 times: more than 102 has probability 0.2 %."""
    rng = np.random.default_rng(0)
    mu, delta = 1.0, 0.05
    epsilon = next(e for e in np.linspace(0, 9, 9001) if delta_of_gaussian(mu, e) <= delta)
    claims = [(e, delta_of_gaussian(mu, e)) for e in np.linspace(0, 5, 26)]
    false = 0
    for _ in range(400):
        evidence, _, _ = bounds.rates_of_trials(trials_of_gaussian(rng, mu, 200), delta, 0.8)
        false += evidence.epsilon > epsilon or bounds.contradicted(evidence, claims) is not None
    assert false <= 102


def test_trials_of_a_gaussian_mechanism_come_close_to_its_epsilon():
    rng = np.random.default_rng(1)
    evidence, _, _ = bounds.rates_of_trials(trials_of_gaussian(rng, 1.0, 40_000), 1e-5, 0.95)
    assert 2.0 < evidence.epsilon < 4.4  # exactly 4.38 at 1e-5


@pytest.mark.parametrize(("tp", "fp"), [(0, 0), (7, 3), (40, 39), (50, 50)])
def test_both_rates_are_bounded_as_scipy_bounds_them(tp, fp):
    counts = np.array([tp]), 50, np.array([fp]), 50
    (low,), (high,) = bounds._bounds(*counts, confidence=0.9)
    inside = scipy.stats.binomtest(tp, 50).proportion_ci(0.9, method="exact")
    outside = scipy.stats.binomtest(fp, 50).proportion_ci(0.9, method="exact")
    assert low == pytest.approx(inside.low, rel=1e-9)
    assert high == pytest.approx(outside.high, rel=1e-9)


def test_claims_about_half_of_the_noise_are_contradicted():
    rng = np.random.default_rng(2)
    claims = [(e, delta_of_gaussian(0.3, e)) for e in np.linspace(0, 2, 11)]
    evidence, _, _ = bounds.rates_of_trials(trials_of_gaussian(rng, 0.6, 4_000), 1e-5, 0.95)
    assert bounds.contradicted(evidence, claims) is not None


def test_the_best_attack_is_chosen():
    rng = np.random.default_rng(3)
    useless = [[rng.normal(size=500)] for _ in range(4)]
    useful = trials_of_gaussian(rng, 3.0, 1_000)
    parts = [a + b for a, b in zip(useless, useful, strict=True)]
    _, attack, _ = bounds.rates_of_trials(bounds.Trials(*parts), 1e-5, 0.95)
    assert attack == 1


def test_scores_that_are_no_numbers_are_refused():
    good = [np.zeros(4)]
    with pytest.raises(ValueError, match="counted_out"):
        bounds.rates_of_trials(bounds.Trials(good, good, good, [np.array([np.nan])]), 1e-5, 0.95)
    with pytest.raises(ValueError, match="chosen_in"):
        bounds.rates_of_trials(bounds.Trials([np.zeros(0)], good, good, good), 1e-5, 0.95)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_coins_behind_randomized_response_are_below_its_epsilon(epsilon):
    """At 80 % confidence, 500 bounds may be false 100 times: above 126 has probability 0.2 %."""
    rng = np.random.default_rng(4)
    correct = rng.binomial(300, 1 / (1 + math.exp(-epsilon)), size=500)
    found = [bounds.one_run_lower_bound(int(c), 300, 300, 0.0, 0.8) for c in correct]
    false = np.sum(np.array(found) > epsilon)
    assert 70 <= false <= 126  # and it is tight there: a fifth of them


def test_delta_lowers_the_bound_of_one_run():
    sharp = bounds.one_run_lower_bound(190, 200, 1_000, 0.0, 0.95)
    with_delta = bounds.one_run_lower_bound(190, 200, 1_000, 1e-5, 0.95)
    assert 0 < with_delta < sharp
    assert bounds.one_run_lower_bound(190, 200, 1_000, 1e-2, 0.95) == 0.0


def test_the_p_value_of_one_run_agrees_with_the_definition():
    """A sum over all binomial outcomes, term by term (arXiv 2305.08846, theorem 5.2)."""
    correct, guesses, canaries, epsilon, delta = 17, 20, 50, 1.2, 1e-3
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    pmf = [
        math.comb(guesses, k) * right**k * (1 - right) ** (guesses - k) for k in range(guesses + 1)
    ]
    tail = lambda v: sum(pmf[max(v, 0) :])  # noqa: E731
    worst = max((tail(correct - i) - tail(correct)) / i for i in range(1, canaries + 1))
    expected = tail(correct) + 2 * canaries * delta * worst
    found = bounds._one_run_p_value(correct, guesses, canaries, epsilon, delta)
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("numbers", [(5, 4, 10), (4, 11, 10), (-1, 4, 10)])
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match="correct"):
        bounds.one_run_lower_bound(*numbers, 1e-5, 0.95)


@pytest.mark.parametrize(("delta", "confidence"), [(1.0, 0.9), (-0.1, 0.9), (0.1, 1.0), (0.1, 0.0)])
def test_rates_out_of_range_are_refused(delta, confidence):
    with pytest.raises(ValueError, match="delta|confidence"):
        bounds.one_run_lower_bound(3, 4, 10, delta, confidence)
