"""The search: safe first step, climbable infinity, an end judged by the gradient alone."""

import numpy as np
import pytest
import scipy.optimize

from keras_bandmf.strategies.search.scipy_lbfgs import Progress, minimize


def quadratic(point):
    return float(point @ point), 2.0 * point


def cliff(point):
    """Minimum 0 at (0.05, ..): infinite beyond 0.1, with a steep slope at the start."""
    if np.any(point > 0.1):
        return np.inf, np.full_like(point, np.nan)
    return float(np.sum(-np.log(0.1 - point) - point / 0.05)), 1 / (0.1 - point) - 20.0


def test_smooth_minimum():
    found = minimize(quadratic, np.array([1.0, -2.0]))
    assert found.gradient_norm <= 1e-6
    np.testing.assert_allclose(found.point, 0.0, atol=1e-6)


def test_infinite_trial_steps_shorten_instead_of_stopping():
    found = minimize(cliff, np.full(3, -5.0))
    np.testing.assert_allclose(found.point, 0.05, atol=1e-6)


def test_the_start_is_left_alone():
    start = np.array([1.0, -2.0])
    minimize(quadratic, start)
    np.testing.assert_array_equal(start, [1.0, -2.0])


def test_a_minimum_at_the_start_takes_one_evaluation():
    assert minimize(quadratic, np.zeros(2)).evaluations == 1


def test_converged_is_never_taken_from_scipy(monkeypatch):
    # SciPy "succeeds" at once without moving: the gradient says otherwise.
    calls = []

    def succeeds_without_moving(*args, **kwargs):
        calls.append(args)
        return scipy.optimize.OptimizeResult(success=True, message="CONVERGENCE")

    monkeypatch.setattr(scipy.optimize, "minimize", succeeds_without_moving)
    with pytest.raises(RuntimeError, match="gradient_norm=4.0"):
        minimize(quadratic, np.array([1.0, -2.0]))
    assert len(calls) > 1, "it must try again before it gives up"


def test_a_kink_is_not_a_minimum():
    def kink(x):
        return float(np.abs(x - np.pi / 30).sum()), np.where(x < np.pi / 30, -1.0, 1.0)

    with pytest.raises(RuntimeError, match="has not found a minimum"):
        minimize(kink, np.array([0.3]))


@pytest.mark.parametrize("value", [np.inf, np.nan, -np.inf])
def test_start_must_be_finite(value):
    with pytest.raises(ValueError, match="finite where the search starts"):
        minimize(lambda x: (value, np.zeros_like(x)), np.ones(2))


def test_progress_is_monotone():
    seen = []
    minimize(quadratic, np.array([1.0, -2.0]), callback=seen.append)
    assert seen and all(isinstance(p, Progress) for p in seen)
    values = [p.value for p in seen]
    assert values == sorted(values, reverse=True)


def test_an_error_in_the_callback_is_not_swallowed():
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minimize(quadratic, np.ones(2), callback=stop)
