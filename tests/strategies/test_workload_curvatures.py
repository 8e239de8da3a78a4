"""Workloads with curvatures, against Keras's SGD on a quadratic loss and against dense matrices."""

import json
import re

import keras
import numpy as np
import pytest

from keras_bandmf import strategies
from keras_bandmf.strategies import (
    BandedStrategy,
    BlockDiagonalStrategy,
    ToeplitzStrategy,
    Workload,
)
from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from keras_bandmf.strategies.errors.banded_graph import GraphErrors
from keras_bandmf.strategies.search.preconditioner import curvature, middle_response
from keras_bandmf.strategies.toeplitz_workload import constant_rate_coefficients
from keras_bandmf.strategies.workload import MAX_CURVATURES, stable_curvature
from tests.strategies import reference


def falling(n):
    return np.linspace(0.3, 0.05, n)


MAKERS = {
    "plain": lambda n: Workload(n, 0.5, curvatures=[0.0, 1.0, 3.9]),
    "one curvature": lambda n: Workload(n, 0.5, momentum=0.9, curvatures=[2.0]),
    "heavy ball": lambda n: Workload(
        n, 0.1, momentum=0.9, curvatures=[0.05, 1.0, 30.0], curvature_weights=[1.0, 2.0, 5.0]
    ),
    "Nesterov": lambda n: Workload(
        n, 0.1, momentum=0.8, nesterov=True, curvatures=[0.3, 10.0], curvature_weights=[3.0, 1.0]
    ),
    "schedule": lambda n: Workload(n, falling(n), momentum=0.9, curvatures=[0.1, 1.0, 10.0]),
    "all": lambda n: Workload(
        n, falling(n), momentum=0.7, nesterov=True, weight_decay=0.2, curvatures=[0.0, 0.7, 4.0]
    ),
    "decay": lambda n: Workload(n, falling(n), weight_decay=0.3, curvatures=[0.2, 5.0]),
    "heavy ball and decay": lambda n: Workload(
        n, 0.2, momentum=0.5, weight_decay=0.4, curvatures=[0.1, 8.0], curvature_weights=[2.0, 1.0]
    ),
}


def dense(workload):
    """A_k for each curvature, by the optimizer's recurrence on unit disturbances of gradients."""
    n = workload.num_steps
    rates = np.broadcast_to(workload.learning_rates, n)
    found = []
    for h in workload.curvatures:
        matrix, velocity, moved = np.zeros((n, n)), np.zeros(n), np.zeros(n)
        for i, rate in enumerate(rates):
            gradient = np.eye(n)[i] - h * moved
            velocity = workload.momentum * velocity + rate * gradient
            ahead = workload.momentum * velocity + rate * gradient
            moved = moved * (1.0 - workload.weight_decay * rate)
            moved = moved + (ahead if workload.nesterov else velocity)
            matrix[i] = moved
        found.append(matrix)
    return found


def dense_errors(workload, inverse):
    """The weighted sum, over curvatures, of the squared row norms of A_k C^-1."""
    pairs = zip(workload.curvature_weights, dense(workload), strict=True)
    return sum(weight * np.sum((a @ inverse) ** 2, axis=1) for weight, a in pairs)


@pytest.mark.parametrize("name", MAKERS)
def test_errors_are_those_of_keras_sgd_on_a_quadratic_with_correlated_noise(name):
    # One weight for each curvature and each independent noise: the loss is sum h w^2 / 2, and what
    # is added to the gradients of step i is row i of C^-1. The weights stay 0 without noise.
    n = 15
    workload = MAKERS[name](n)
    strategy = ToeplitzStrategy([1.0, 0.6, 0.3], n, workload=workload)
    noise = np.linalg.inv(strategy.materialize())
    rates = np.broadcast_to(workload.learning_rates, n)
    optimizer = reference.keras_sgd(workload)
    h = np.array(workload.curvatures)[:, None]
    weights = keras.Variable(np.zeros((len(h), n)), dtype="float64")
    found = []
    for i in range(n):
        optimizer.learning_rate = float(rates[i])
        gradient = h * weights.numpy() + noise[i]
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float64")], [weights])
        by_curvature = np.sum(np.square(weights.numpy()), axis=1)
        found.append(np.array(workload.curvature_weights) @ by_curvature)
    # Keras keeps learning rates in float32.
    np.testing.assert_allclose(strategy.per_step_error(), found, rtol=2e-5)


def of_each_class():
    """Sizes and workloads for the NumPy code, and fewer for the graph, which is slow to trace."""
    sizes = [(1, 1), (20, 1), (7, 3), (64, 64), (100, 20)]
    yield from ((n, b, name, BandedErrors) for n, b in sizes for name in MAKERS)
    yield from ((40, 7, name, GraphErrors) for name in ("heavy ball", "all", "plain"))


@pytest.mark.parametrize("n,b,name,errors_class", of_each_class())
def test_errors_and_gradients_are_those_of_the_dense_matrices(n, b, name, errors_class):
    workload = MAKERS[name](n)
    random = np.random.default_rng(n)
    columns = random.standard_normal((n, b)) / b
    columns[:, 0] = 1.0 + random.random(n)
    matrix = reference.dense_columns(columns)
    errors = errors_class(n, b, workload.blocks(block_size(b)))
    expected = dense_errors(workload, np.linalg.inv(matrix))
    found = errors.evaluate(columns)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14 * np.max(expected))
    weights = random.random(n)
    pairs = zip(workload.curvature_weights, dense(workload), strict=True)
    gradient = sum(p * reference.dense_error_gradient(matrix, a, weights) for p, a in pairs)
    gradient = reference.band_of(gradient, b)
    tolerance = 1e-10 * np.max(np.abs(gradient))
    found = errors.gradient(weights)
    np.testing.assert_allclose(found, gradient, rtol=0, atol=tolerance)
    # And by finite differences, along one direction.
    direction = reference.band_of(np.tril(random.standard_normal((n, n))), b)
    ahead, behind = (errors.evaluate(columns + s * 1e-5 * direction) for s in (1, -1))
    slope = weights @ (ahead - behind) / 2e-5
    scale = np.sum(np.abs(gradient * direction))
    assert slope == pytest.approx(np.sum(found * direction), abs=1e-6 * scale)


@pytest.mark.parametrize("name", MAKERS)
def test_strategies_of_all_kinds(name):
    n, b = 60, 5
    workload = MAKERS[name](n)
    toeplitz = ToeplitzStrategy.optimize(n, b, workload=workload)
    banded = BandedStrategy.optimize(n, b, workload=workload)
    blocks = BlockDiagonalStrategy.optimize(n, b, block_steps=20, workload=workload)
    for s in (toeplitz, banded, blocks):
        expected = dense_errors(workload, np.linalg.inv(s.materialize()))
        np.testing.assert_allclose(s.per_step_error(), expected, rtol=1e-9)
        assert s.loss("mean") == pytest.approx(np.mean(expected), rel=1e-10)
        assert s.loss("max") == pytest.approx(np.max(expected), rel=1e-10)
        back = strategies.from_config(json.loads(json.dumps(s.get_config())))
        assert back == s and hash(back) == hash(s) and back.workload == workload
    ordinary = ToeplitzStrategy(ToeplitzStrategy.optimize(n, b).coefficients, n, workload=workload)
    slack = 1 + 1e-9
    assert banded.loss() <= toeplitz.loss() * slack <= ordinary.loss() * slack**2
    assert banded.loss() <= blocks.loss() * slack
    identity = ToeplitzStrategy([1.0], n, workload=workload)
    assert blocks.loss() <= identity.loss() * slack


@pytest.mark.parametrize("error", ["mean", "max"])
@pytest.mark.parametrize("name", ["heavy ball", "schedule", "Nesterov"])
def test_optima_are_locally_best(name, error):
    n, b = 40, 3
    workload = MAKERS[name](n)
    slack = 1e-4 * (error == "max")
    best = ToeplitzStrategy.optimize(n, b, error, workload=workload)
    for direction in np.vstack([np.eye(b), -np.eye(b)]):
        other = ToeplitzStrategy(best.coefficients + 1e-2 * direction, n, workload=workload)
        assert other.loss(error) > best.loss(error) * (1 - slack)
    columns = BandedStrategy.optimize(n, b, error, workload=workload).columns
    random = np.random.default_rng(0)
    for _ in range(20):
        moved = BandedStrategy(columns + 1e-2 * random.standard_normal((n, b)), workload)
        assert moved.loss(error) > BandedStrategy(columns, workload).loss(error) * (1 - slack)


@pytest.mark.parametrize("error", ["mean", "max"])
@pytest.mark.parametrize("name", ["plain", "heavy ball", "Nesterov", "heavy ball and decay"])
def test_coefficients_for_a_constant_rate_are_the_best_without_normalized_columns(name, error):
    n, b = 50, 4
    workload = MAKERS[name](n)

    def loss(coefficients):
        return ToeplitzStrategy(coefficients, n, False, workload).loss(error)

    best = constant_rate_coefficients(workload, b, error)
    exact = ToeplitzStrategy.optimize(n, b, error, False, workload=workload)
    assert loss(best) == pytest.approx(exact.loss(error), rel=1e-6)
    for direction in np.vstack([np.eye(b), -np.eye(b)]):
        assert loss(best + 1e-2 * direction) > loss(best) * (1 - 1e-12)


@pytest.mark.parametrize("learning_rates", [0.5, falling(30)])
def test_for_plain_sgd_one_curvature_is_weight_decay(learning_rates):
    columns = np.random.default_rng(0).random((30, 4)) + np.eye(1, 4)
    decay = BandedStrategy(columns, Workload(30, learning_rates, weight_decay=0.4))
    curved = BandedStrategy(columns, Workload(30, learning_rates, curvatures=[0.4]))
    np.testing.assert_allclose(decay.per_step_error(), curved.per_step_error(), rtol=1e-12)
    # With momentum, curvature acts through the gradients, and decay does not.
    decay = BandedStrategy(columns, Workload(30, 0.5, 0.9, weight_decay=0.4))
    curved = BandedStrategy(columns, Workload(30, 0.5, 0.9, curvatures=[0.4]))
    assert not np.allclose(decay.per_step_error(), curved.per_step_error(), rtol=0.1)


def test_the_error_of_several_curvatures_is_the_weighted_mean_of_their_errors():
    def errors(**of_curvature):
        workload = Workload(30, 0.1, momentum=0.9, **of_curvature)
        return ToeplitzStrategy([1.0, 0.5], 30, workload=workload).per_step_error()

    one, two = errors(curvatures=[0.5]), errors(curvatures=[4.0])
    both = errors(curvatures=[0.5, 4.0], curvature_weights=[1.0, 3.0])
    np.testing.assert_allclose(both, (one + 3.0 * two) / 4.0, rtol=1e-12)
    np.testing.assert_allclose(errors(curvatures=[0.5, 0.5]), one, rtol=1e-12)


def test_where_training_undoes_noise_less_of_it_is_cancelled():
    # The steeper the loss, the closer the best C is to the identity.
    leading = [
        ToeplitzStrategy.optimize(200, 8, workload=Workload(200, 0.1, curvatures=[h])).coefficients[
            0
        ]
        for h in (0.0, 0.1, 1.0, 5.0, 10.0)
    ]
    assert leading == sorted(leading) and leading[0] < 0.7
    # At h = 1 / learning rate a step forgets all that was before: nothing can be cancelled.
    assert leading[-1] == pytest.approx(1.0, abs=1e-6)


def test_without_curvatures_nothing_changes():
    assert Workload(5) == Workload(5, curvatures=[0.0]) == Workload(5, curvatures=np.zeros(1))
    assert not Workload(5).is_curved and Workload(5, curvatures=[0.0, 0.0]).is_curved
    config = Workload(5, 0.1, momentum=0.9).get_config()
    assert set(config) == {"num_steps", "learning_rates", "momentum", "nesterov", "weight_decay"}
    assert "curvatures" not in repr(Workload(5))


def test_values_configs_and_equality():
    values = np.array([0.5, 2.0])
    workload = Workload(5, 0.1, curvatures=values, curvature_weights=np.array([1, 2]))
    values[0] = 9.0
    assert workload.curvatures == (0.5, 2.0)
    assert workload.curvature_weights == (1 / 3, 2 / 3)
    assert "curvatures=[0.5, 2.0]" in repr(workload)
    same = Workload(5, 0.1, curvatures=[0.5, 2.0], curvature_weights=[2.0, 4.0])
    assert workload == same and hash(workload) == hash(same)
    assert len({workload, same, Workload(5, 0.1, curvatures=[0.5, 2.0]), Workload(5, 0.1)}) == 3
    random = np.random.default_rng(0)
    for count in (1, 2, 7, MAX_CURVATURES):
        weights = random.random(count) * 10.0 ** random.integers(-200, 200)
        made = Workload(5, 0.1, curvatures=random.random(count), curvature_weights=weights)
        assert sum(made.curvature_weights) == pytest.approx(1.0, rel=1e-14)
        assert Workload.from_config(json.loads(json.dumps(made.get_config()))) == made


def test_bad_configs():
    good = Workload(3, 0.1, curvatures=[1.0, 2.0]).get_config()
    half = {name: value for name, value in good.items() if name != "curvature_weights"}
    for config in (half, {**good, "curvatures": [1.0]}, {**good, "extra": 1}):
        with pytest.raises(ValueError, match="Received"):
            Workload.from_config(config)


@pytest.mark.parametrize(
    "argument",
    [
        {"curvatures": []},
        {"curvatures": 1.0},
        {"curvatures": None},
        {"curvatures": ["1"]},
        {"curvatures": [True]},
        {"curvatures": [[1.0]]},
        {"curvatures": [[1.0], 2.0]},
        {"curvatures": [np.nan]},
        {"curvatures": [np.inf]},
        {"curvatures": [1.0, -1e-3]},
        {"curvatures": [0.1] * (MAX_CURVATURES + 1)},
        {"curvature_weights": [1.0]},
        {"curvature_weights": [1.0, 0.0]},
        {"curvature_weights": [1.0, -1.0]},
        {"curvature_weights": [1.0, np.nan]},
        {"curvature_weights": 1.0},
        {"curvature_weights": "12"},
    ],
)
def test_bad_arguments(argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"`{name}`.*Received"):
        Workload(**{"num_steps": 3, "curvatures": [0.1, 0.2], **argument})


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.9])
def test_the_stable_curvature_is_where_an_eigenvalue_reaches_minus_one(nesterov, momentum, decay):
    rate = 0.5

    def radius(h):
        # One step of (v, w), by the recurrence.
        columns = []
        for velocity, moved in np.eye(2):
            new = momentum * velocity - rate * h * moved
            step = momentum * new - rate * h * moved if nesterov else new
            columns.append([new, (1 - decay * rate) * moved + step])
        return np.max(np.abs(np.linalg.eigvals(np.array(columns).T)))

    limit = stable_curvature(rate, momentum, nesterov, decay)
    assert radius(limit * (1 + 1e-6)) > 1.0
    for share in np.linspace(0.0, 1.0, 50):
        assert radius(share * limit) <= 1.0 + 1e-9
    sgd = {"momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
    Workload(20, rate, **sgd, curvatures=[limit])
    message = "`curvatures` to be at most .*diverges.*Received: a curvature of "
    for rates in (rate, np.linspace(0.0, rate, 20)):
        with pytest.raises(ValueError, match=message + re.escape(f"{1.01 * limit:.6g}")):
            Workload(20, rates, **sgd, curvatures=[0.1, 1.01 * limit])


def test_too_much_for_memory():
    n = 10**6
    workload = Workload(n, curvatures=np.linspace(0.1, 1.0, 60))
    with pytest.raises(ValueError, match="num_bands=2, a workload with 60 curvatures"):
        ToeplitzStrategy.optimize(n, 2, workload=workload)
    with pytest.raises(ValueError, match="num_bands=2, a workload with 60 curvatures"):
        ToeplitzStrategy([1.0, 0.5], n, workload=workload).per_step_error()
    for make in (
        lambda: BandedStrategy.optimize(n, 2, workload=workload),
        lambda: BlockDiagonalStrategy.optimize(n, 2, 10, workload=workload),
    ):
        with pytest.raises(ValueError, match="num_bands=2, a workload with 60 curvatures"):
            make()


def test_the_preconditioner_sees_all_curvatures():
    n = 70
    workload = MAKERS["schedule"](n)
    response = middle_response(workload.blocks(8), n)
    half = n - len(response)
    for k, a in enumerate(dense(workload)):
        scaled = np.sqrt(workload.curvature_weights[k]) * a[half:, half]
        np.testing.assert_allclose(response[:, k], scaled, rtol=1e-12)
    c = ToeplitzStrategy.optimize(n, 3).coefficients
    apart = sum(curvature(c, response[:, [k]], 5) for k in range(3))
    np.testing.assert_allclose(curvature(c, response, 5), apart, atol=1e-12 * np.max(apart))
