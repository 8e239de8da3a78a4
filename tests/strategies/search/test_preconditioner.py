"""The curvature of the error and the change of variables that evens it out."""

import numpy as np
import pytest

from keras_bandmf.strategies import BandedStrategy, ToeplitzStrategy, Workload
from keras_bandmf.strategies.search.preconditioner import (
    Preconditioner,
    curvature,
    middle_response,
    preconditioner_of,
)
from keras_bandmf.strategies.workload import blocks_of
from tests.strategies import reference


def dense_workload(workload):
    """A of prefix sums with momentum, by its recurrence."""
    matrix, velocity = np.zeros((workload.num_steps,) * 2), np.zeros(workload.num_steps)
    weights = np.zeros(workload.num_steps)
    rates = np.broadcast_to(workload.learning_rates, workload.num_steps)
    for i, rate in enumerate(rates):
        velocity = workload.momentum * velocity
        velocity[i] += rate
        weights = weights + velocity
        matrix[i] = weights
    return matrix


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("schedule", [False, True])
def test_the_middle_response_is_a_column_of_the_workload(momentum, schedule):
    n = 70
    rates = np.linspace(1.0, 3.0, n) if schedule else 1.0
    workload = Workload(n, learning_rates=rates, momentum=momentum)
    response = middle_response(workload.blocks(8), n)
    half = n - len(response)
    assert half in (32, 40)
    np.testing.assert_allclose(response[:, 0], dense_workload(workload)[half:, half], rtol=1e-12)


def test_the_curvature_is_that_of_the_dense_error_in_the_interior():
    # The trace of A'A X^-1 to second order, X being moved as C is: far from the ends only.
    n, b, j = 200, 3, 100
    c = ToeplitzStrategy.optimize(n, b).coefficients
    matrix = reference.dense_columns(np.tile(c, (n, 1)))
    inverse = np.linalg.inv(matrix.T @ matrix)
    weighted = inverse @ np.tri(n).T @ np.tri(n) @ inverse

    def moved(column, entry):
        d = np.zeros(b)
        d[entry] = 1.0
        d -= c * c[entry]
        x = np.zeros((n, n))
        for k in range(b):
            row = matrix[column + k]
            x[column] += d[k] * row
            x[:, column] += d[k] * row
        return x

    found = curvature(c, np.ones((n - j, 1)), 5)
    for d in (-4, -1, 0, 1, 3):
        expected = np.empty((b, b))
        for e in range(b):
            for k in range(b):
                one, two = moved(j, k), moved(j + d, e)
                expected[e, k] = 2.0 * np.trace(weighted @ one @ inverse @ two)
        # At j + d the dense one sums over n - j - d rows instead of n - j.
        np.testing.assert_allclose(found[5 + d], expected, atol=0.06 * np.max(np.abs(expected)))


@pytest.mark.parametrize("n,b", [(4, 2), (9, 3), (700, 3), (2500, 2)])
def test_it_is_its_own_adjoint_and_a_convolution(n, b):
    random = np.random.default_rng(n)
    start = np.tile(ToeplitzStrategy.optimize(n, b).coefficients, (n, 1))
    apply = preconditioner_of(start, blocks_of(None, n, 16))
    x, y = random.standard_normal((2, n, b))
    before = x.copy()
    left = np.sum(y * apply(x))
    np.testing.assert_array_equal(x, before)
    assert left == pytest.approx(np.sum(x * apply(y)), rel=1e-11)
    # A shifted input gives a shifted output, also across pieces.
    pulse = np.zeros((n, b))
    pulse[n // 2, 0] = 1.0
    shift = min(n // 4, 300)
    response, shifted = apply(pulse), apply(np.roll(pulse, -shift, axis=0))
    np.testing.assert_allclose(shifted[: n - shift], response[shift:], atol=1e-12)


def test_it_takes_fewer_iterations_and_finds_the_same(monkeypatch):
    from keras_bandmf.strategies.search import banded

    def iterations():
        seen = []
        return BandedStrategy.optimize(300, 8, callback=seen.append).loss(), len(seen)

    loss, some = iterations()
    monkeypatch.setattr(banded, "preconditioner_of", lambda *_: None)
    plain, many = iterations()
    assert loss == pytest.approx(plain, rel=1e-7) and some < 0.6 * many


def test_where_it_means_nothing_there_is_none():
    n = 100
    explodes = BandedStrategy(np.tile([1.0, -1e9], (n, 1))).columns
    assert preconditioner_of(explodes, blocks_of(None, n, 16)) is None
    for steps, b in ((65 * 65, 65), (63, 8)):
        bands = np.tile(np.eye(1, b), (steps, 1))
        assert preconditioner_of(bands, blocks_of(None, steps, 64)) is None
    idle = Workload(n, learning_rates=np.where(np.arange(n) < 5, 1.0, 0.0))
    fine = np.tile([0.8, 0.6], (n, 1))
    assert preconditioner_of(fine, blocks_of(idle, n, 16)) is None
    with pytest.raises(ValueError, match="finite and positive.*Received: kernel"):
        Preconditioner(np.full((3, 2, 2), np.nan), fine[0], n)
