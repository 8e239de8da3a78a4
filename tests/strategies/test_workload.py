"""Workloads against dense matrices made by running the optimizer; strategies under them."""

import json

import keras
import numpy as np
import pytest

from keras_bandmf import strategies
from keras_bandmf.strategies import BandedStrategy, ToeplitzStrategy, Workload
from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from tests.strategies import reference


def warm_up(n):
    rates = np.linspace(0.0, 1.0, n) * np.exp(-np.arange(n) / n)
    rates[n // 2 : n // 2 + 3] = 0.0
    return rates + (0.5 if n == 1 else 0.0)


def workloads(n):
    return [
        Workload(n),
        Workload(n, 0.1),
        Workload(n, warm_up(n)),
        Workload(n, momentum=0.9),
        Workload(n, warm_up(n), momentum=0.95),
        Workload(n, warm_up(n), momentum=0.95, nesterov=True),
        Workload(n, warm_up(n), momentum=0.9, weight_decay=0.1),
        Workload(n, 0.3, momentum=0.5, nesterov=True, weight_decay=0.01),
        Workload(n, warm_up(n), weight_decay=0.2),
        Workload(n, warm_up(n), nesterov=True),
    ]


def dense(workload):
    """A by running the optimizer's recurrence on every unit gradient."""
    n = workload.num_steps
    rates = np.broadcast_to(workload.learning_rates, n)
    matrix, velocity, weights = np.zeros((n, n)), np.zeros(n), np.zeros(n)
    for i in range(n):
        gradient = np.eye(n)[i]
        weights = weights * (1.0 - workload.weight_decay * rates[i])
        if workload.momentum == 0.0:
            weights = weights + rates[i] * gradient
        else:
            velocity = workload.momentum * velocity + rates[i] * gradient
            ahead = workload.momentum * velocity + rates[i] * gradient
            weights = weights + (ahead if workload.nesterov else velocity)
        matrix[i] = weights
    return matrix


@pytest.mark.parametrize("case", range(10))
def test_the_dense_reference_is_what_keras_does(case):
    n = 12
    workload = workloads(n)[case]
    rates = np.broadcast_to(workload.learning_rates, n)
    optimizer = reference.keras_sgd(workload)
    weights = keras.Variable(np.zeros(n, np.float32))
    for i in range(n):
        optimizer.learning_rate = float(rates[i])
        optimizer.apply([np.eye(n, dtype=np.float32)[i]], [weights])
        np.testing.assert_allclose(-weights.numpy(), dense(workload)[i], atol=1e-6)


@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize("n,b", [(1, 1), (20, 1), (7, 3), (64, 64), (200, 20)])
def test_errors_and_gradients_are_those_of_the_dense_matrix(n, b, case):
    workload = workloads(n)[case]
    random = np.random.default_rng(case)
    columns = random.standard_normal((n, b)) / b
    columns[:, 0] = 1.0 + random.random(n)
    matrix, a = reference.dense_columns(columns), dense(workload)
    expected = np.sum((a @ np.linalg.inv(matrix)) ** 2, axis=1)
    errors = BandedErrors(n, b, workload.blocks(block_size(b)))
    found = errors.evaluate(columns)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14 * np.max(expected))
    one_hot = (np.arange(n) == np.argmax(expected)).astype(float)
    for weights in (np.full(n, 1 / n), one_hot):
        gradient = reference.band_of(reference.dense_error_gradient(matrix, a, weights), b)
        tolerance = 1e-10 * np.max(np.abs(gradient)) + 1e-300
        np.testing.assert_allclose(errors.gradient(weights), gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", range(10))
def test_strategies_under_a_workload(case):
    n, b = 80, 6
    workload = workloads(n)[case]
    toeplitz = ToeplitzStrategy.optimize(n, b, workload=workload)
    banded = BandedStrategy.optimize(n, b, workload=workload)
    for s in (toeplitz, banded):
        expected = np.sum((dense(workload) @ np.linalg.inv(s.materialize())) ** 2, axis=1)
        np.testing.assert_allclose(s.per_step_error(), expected, rtol=1e-9, atol=1e-13)
        assert s.loss("mean") == pytest.approx(np.mean(expected), rel=1e-10)
        assert s.loss("max") == pytest.approx(np.max(expected), rel=1e-10)
        back = strategies.from_config(json.loads(json.dumps(s.get_config())))
        assert back == s and hash(back) == hash(s) and back.workload == workload
    ordinary = ToeplitzStrategy.optimize(n, b)
    under_it = ToeplitzStrategy(ordinary.coefficients, n, workload=workload)
    tolerance = 1 + 1e-12
    assert banded.loss() <= toeplitz.loss() * tolerance <= under_it.loss() * tolerance**2


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("error", ["mean", "max"])
def test_toeplitz_coefficients_are_locally_best(normalize, error):
    n, b = 60, 4
    workload = Workload(n, np.linspace(1.0, 0.1, n), momentum=0.9)
    best = ToeplitzStrategy.optimize(n, b, error, normalize, workload=workload)
    for direction in np.vstack([np.eye(b), -np.eye(b)]):
        moved = best.coefficients + 1e-2 * direction
        other = ToeplitzStrategy(moved, n, normalize, workload)
        assert other.loss(error) > best.loss(error) * (1 - 1e-4 * (error == "max"))


def test_prefix_sums_by_either_route():
    plain, workload = (ToeplitzStrategy.optimize(300, 9, workload=w) for w in (None, Workload(300)))
    assert plain.workload is None and plain != workload
    np.testing.assert_allclose(
        ToeplitzStrategy(plain.coefficients, 300, workload=Workload(300)).per_step_error(),
        plain.per_step_error(),
        rtol=1e-11,
    )
    # With a workload the column-normalized loss itself is minimized.
    assert workload.loss() <= plain.loss()


def test_configs_without_a_workload_say_nothing_of_it():
    for s in (ToeplitzStrategy.optimize(20, 2), BandedStrategy.optimize(20, 2)):
        assert "workload" not in s.get_config()


def test_workload_values():
    rates = np.array([0.5, 0.25, 0.0])
    w = Workload(3, rates)
    rates[0] = 9.0
    assert w == Workload(3, [0.5, 0.25, 0.0]) and hash(w) == hash(Workload(3, [0.5, 0.25, 0.0]))
    assert w != Workload(3, [0.5, 0.25, 0.1]) and w != Workload(3) and w != "Workload"
    with pytest.raises(ValueError):
        w.learning_rates[0] = 1.0
    np.testing.assert_array_equal(dense(Workload(5)), np.tri(5))


@pytest.mark.parametrize(
    "argument",
    [
        {"num_steps": 0},
        {"num_steps": 3.0},
        {"learning_rates": 0.0},
        {"learning_rates": -1.0},
        {"learning_rates": [0.0, 0.0, 0.0]},
        {"learning_rates": [1.0, 1.0]},
        {"learning_rates": [1.0, -0.1, 1.0]},
        {"learning_rates": [1.0, np.nan, 1.0]},
        {"learning_rates": [[1.0, 1.0, 1.0]]},
        {"learning_rates": "1.0"},
        {"learning_rates": True},
        {"learning_rates": None},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"momentum": True},
        {"momentum": "0.9"},
        {"momentum": float("nan")},
        {"nesterov": 1},
        {"weight_decay": -0.1},
        {"weight_decay": 1.5},
        {"weight_decay": float("inf")},
    ],
)
def test_bad_arguments(argument):
    (name,) = argument
    with pytest.raises((TypeError, ValueError), match=f"`{name}`.*Received"):
        Workload(**{"num_steps": 3, **argument})


@pytest.mark.parametrize("bad", [Workload(9), "prefix", 1.0])
def test_a_workload_of_other_steps_or_none_at_all(bad):
    match = "Expected `workload` to be a `Workload` of 10 steps.*Received: workload="
    expected = ValueError if isinstance(bad, Workload) else TypeError
    for make in (
        lambda: ToeplitzStrategy([1.0, 0.5], 10, workload=bad),
        lambda: ToeplitzStrategy.optimize(10, 2, workload=bad),
        lambda: BandedStrategy(np.ones((10, 2)), bad),
        lambda: BandedStrategy.optimize(10, 2, workload=bad),
    ):
        with pytest.raises(expected, match=match):
            make()


def test_bad_config():
    good = Workload(3, momentum=0.9).get_config()
    for config in (None, {}, {**good, "extra": 1}, {**good, "learning_rates": [1.0]}):
        with pytest.raises(ValueError, match="Received"):
            Workload.from_config(config)
    strategy = ToeplitzStrategy([1.0, 0.5], 10).get_config()
    for config in ({**strategy, "workload": good}, {**strategy, "workload": None}):
        with pytest.raises(ValueError, match="Received"):
            strategies.from_config(config)
