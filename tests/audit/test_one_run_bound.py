"""Lower bounds from the guesses of one run: with simulated attacks, and by hand without delta."""

import math

import numpy as np
import pytest

from keras_bandmf.audit.bounds import one_run_lower_bound


def test_without_delta_it_is_the_bound_of_a_binomial():
    # All right: p^r = 5 % at the bound.
    for r in (1, 10, 1_000):
        p = 0.05 ** (1 / r)
        expected = max(0.0, math.log(p / (1 - p))) if r > 4 else 0.0
        assert one_run_lower_bound(r, r, r, 0.0, 0.95) == pytest.approx(expected, abs=1e-9)


def test_it_rises_with_right_guesses_and_falls_with_canaries_delta_and_confidence():
    base = one_run_lower_bound(90, 100, 1_000, 1e-6, 0.95)
    assert 1.0 < base < math.log(9)
    assert one_run_lower_bound(91, 100, 1_000, 1e-6, 0.95) > base
    assert one_run_lower_bound(90, 100, 100_000, 1e-6, 0.95) < base
    assert one_run_lower_bound(90, 100, 1_000, 1e-4, 0.95) < base
    assert one_run_lower_bound(90, 100, 1_000, 1e-6, 0.99) < base
    assert one_run_lower_bound(0, 100, 100, 1e-6, 0.95) == 0.0
    assert one_run_lower_bound(50, 100, 100, 1.0 - 1e-9, 0.95) == 0.0


@pytest.mark.parametrize("delta", [0.0, 0.002])
def test_it_is_above_the_truth_no_more_often_than_stated(delta):
    # Randomized response that shows the coin outright with probability delta.
    epsilon, m = 1.0, 200
    rng = np.random.default_rng(0)
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    correct = rng.binomial(m, right, 4_000)
    values, counts = np.unique(correct, return_counts=True)
    above = [one_run_lower_bound(int(v), m, m, delta, 0.9) > epsilon for v in values]
    share = counts[above].sum() / counts.sum()
    assert share <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 4_000)
    if delta == 0.0:
        assert share > 0.05  # not idle either


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"correct": 101}, ValueError, "correct=101"),
        ({"correct": -1}, ValueError, "correct"),
        ({"correct": 1.5}, TypeError, "correct"),
        ({"guesses": 201}, ValueError, "guesses=201"),
        ({"guesses": 0}, ValueError, "guesses"),
        ({"delta": float("nan")}, ValueError, "delta"),
        ({"delta": 1.0}, ValueError, "delta"),
        ({"confidence": 0.0}, ValueError, "confidence"),
        ({"confidence": "sure"}, TypeError, "confidence"),
    ],
)
def test_bad_arguments_are_refused(changes, error, words):
    arguments = {"correct": 60, "guesses": 100, "canaries": 200, "delta": 1e-5, "confidence": 0.95}
    with pytest.raises(error, match=words):
        one_run_lower_bound(**(arguments | changes))
