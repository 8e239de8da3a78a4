"""The L-BFGS for many unknowns: what it finds, when it ends, what it refuses."""

import numpy as np
import pytest

from keras_bandmf.strategies.search.lbfgs import descend


def quadratic(curvatures):
    def objective(point):
        return 0.5 * float(curvatures @ point**2), curvatures * point

    return objective


def test_finds_the_minimum_of_a_quadratic_and_leaves_the_start_alone():
    start = np.ones(20_000)  # longer than a piece
    found = descend(quadratic(np.linspace(1.0, 50.0, 20_000)), start, 0.1, 1e-12, 500)
    assert found.converged and found.value < 1e-9
    np.testing.assert_array_equal(start, 1.0)


def rosenbrock(x):
    value = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    slope = [-400 * x[0] * (x[1] - x[0] ** 2) - 2 * (1 - x[0]), 200 * (x[1] - x[0] ** 2)]
    return value, np.array(slope)


def test_finds_the_end_of_a_curved_valley():
    found = descend(rosenbrock, np.array([-1.2, 1.0]), 0.1, 1e-14, 500)
    np.testing.assert_allclose(found.point, [1.0, 1.0], atol=1e-5)


def test_steps_back_from_where_the_objective_is_infinite():
    def objective(x):
        if x[0] >= 1.0:
            return np.inf, x
        return -np.log(1.0 - x[0]) + 2.0 * x[0] ** 2 - 6.0 * x[0], np.array(
            [1.0 / (1.0 - x[0]) + 4.0 * x[0] - 6.0]
        )

    found = descend(objective, np.array([-3.0]), 10.0, 1e-14, 200)
    assert found.converged
    slope = objective(found.point)[1]
    assert abs(slope[0]) < 1e-5


def test_overwritten_gradients_are_read_in_time():
    shared = np.empty(3)

    def objective(x):
        shared[:] = 2.0 * x
        return float(x @ x), shared

    assert descend(objective, np.array([1.0, -2.0, 3.0]), 0.1, 1e-14, 100).value < 1e-12


def test_values_fall_and_progress_is_reported():
    seen = []
    descend(rosenbrock, np.array([-1.2, 1.0]), 0.1, 1e-12, 500, callback=seen.append)
    values = [progress.value for progress in seen]
    assert values == sorted(values, reverse=True) and len(seen) > 10
    assert seen[-1].gradient_norm < seen[0].gradient_norm


def test_says_when_it_ran_out_of_iterations():
    found = descend(rosenbrock, np.array([-1.2, 1.0]), 0.1, 1e-12, 3)
    assert not found.converged and found.gain > 0.0
    assert found.value < rosenbrock(np.array([-1.2, 1.0]))[0]


def test_starting_at_the_minimum_ends_there():
    found = descend(quadratic(np.ones(4)), np.zeros(4), 0.1, 1e-9, 100)
    assert found.converged and found.value == 0.0 and found.evaluations == 1


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_start_that_is_not_finite(value):
    with pytest.raises(ValueError, match="finite where the search starts. Received: value="):
        descend(lambda x: (value, x), np.ones(2), 0.1, 1e-9, 10)
