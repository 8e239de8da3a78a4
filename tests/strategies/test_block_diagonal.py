"""Block-diagonal strategies against dense matrices."""

import json

import numpy as np
import pytest
import scipy.optimize

from keras_bandmf import strategies
from keras_bandmf.strategies.block_diagonal import BlockDiagonalStrategy, _BlockErrors

SHAPES = [(20, 3, 5), (23, 4, 5), (16, 4, 4), (9, 2, 9), (12, 1, 4)]


def dense(block, num_steps):
    """C from a dense block: copies on the diagonal, the last one cut, columns of norm 1."""
    length = len(block)
    matrix = np.zeros((num_steps, num_steps))
    for start in range(0, num_steps, length):
        size = min(length, num_steps - start)
        matrix[start : start + size, start : start + size] = block[:size, :size]
    return matrix / np.linalg.norm(matrix, axis=0)


def dense_errors(matrix, workload=None):
    """Squared row norms of A C^-1."""
    n = len(matrix)
    a = np.tril(np.ones((n, n))) if workload is None else workload
    return np.sum(np.square(a @ np.linalg.inv(matrix)), axis=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_matrix_errors_and_rows_equal_the_dense_ones(shape):
    """C, its errors and its recurrence, the restart of the noise at a block included."""
    n, b, length = shape
    strategy = BlockDiagonalStrategy.optimize(n, b, length, max_iterations=20)
    assert (strategy.num_steps, strategy.num_bands, strategy.block_steps) == shape
    matrix = dense(strategy.block.materialize(), n)
    np.testing.assert_allclose(strategy.materialize(), matrix, atol=1e-12)
    np.testing.assert_allclose(strategy.per_step_error(), dense_errors(matrix), rtol=1e-9)
    assert strategy.sensitivity() == pytest.approx(1.0, abs=1e-12)
    rows, z = strategy.noise_rows(), np.random.default_rng(0).normal(size=n)
    x = np.zeros(n)
    for i in range(n):
        assert not rows[i, i % length + 1 :].any()
        past = sum(rows[i, k] * x[i - k] for k in range(1, min(i + 1, b)))
        x[i] = (z[i] - past) / rows[i, 0]
    np.testing.assert_allclose(matrix @ x, z, atol=1e-10)


@pytest.mark.parametrize("power", [1.0, 64.0])
def test_the_gradient_of_the_search_is_right(power):
    errors = _BlockErrors(13, 3, None)

    def loss(point):
        return errors.log_mean(point, power)

    rng = np.random.default_rng(1)
    point = np.ravel(np.eye(1, 3) + 0.2 * rng.normal(size=(5, 3)))
    gradient = loss(point)[1]
    numeric = scipy.optimize.approx_fprime(point, lambda p: loss(p)[0], 1e-7)
    np.testing.assert_allclose(gradient, numeric, atol=1e-5)


def test_the_search_finds_the_dense_optimum():
    """Against a search over dense lower-triangular blocks by numerical gradients."""
    n, b, length = 12, 3, 3

    def value(point):
        block = np.eye(length)
        block[np.tril_indices(length, -1)] = point
        return np.mean(dense_errors(dense(block, n)))

    best = scipy.optimize.minimize(value, np.zeros(3), method="BFGS").fun
    strategy = BlockDiagonalStrategy.optimize(n, b, length)
    assert strategy.loss() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("error", ["mean", "max"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_search_with_many_unknowns_ends_at_a_minimum(error, momentum):
    """No small change of the block lowers the error, or, for the largest, its power mean."""
    n, b, length = 120, 8, 20
    workload = strategies.Workload(n, momentum=momentum)
    strategy = BlockDiagonalStrategy.optimize(n, b, length, error, workload=workload)
    errors = _BlockErrors(n, b, workload)
    power = 1.0 if error == "mean" else 4096.0
    gradient = errors.log_mean(strategy.block.columns.reshape(-1), power)[1]
    assert np.max(np.abs(gradient)) < 1e-3
    independent = BlockDiagonalStrategy.optimize(n, 1, length, workload=workload)
    assert strategy.loss(error) < 0.25 * independent.loss(error)


def test_a_block_without_an_inverse_has_an_infinite_error():
    errors = _BlockErrors(13, 3, None)
    point = np.ravel(np.eye(1, 3).repeat(5, axis=0))
    point[3] = 0.0
    assert np.all(np.isinf(errors.evaluate(point)))
    assert errors.log_mean(point, 1.0)[0] == np.inf


def test_many_blocks_want_another_block_than_one():
    """The sum over a block is what later errors see: its weight grows with the blocks."""
    n, b, length = 80, 4, 4
    alone = strategies.BandedStrategy.optimize(length, b)
    best = BlockDiagonalStrategy.optimize(n, b, length).loss()
    assert best < BlockDiagonalStrategy(alone, n).loss() * 0.999
    assert best < BlockDiagonalStrategy.optimize(n, 1, 1).loss() * 0.8


def test_a_workload_is_taken_into_account():
    """Momentum: errors equal the dense ones, and the search uses them."""
    n = 20
    workload = strategies.Workload(n, momentum=0.9)
    strategy = BlockDiagonalStrategy.optimize(n, 3, 5, workload=workload)
    a = np.zeros((n, n))
    for j in range(n):
        velocity, weight = 0.0, 0.0
        for i in range(n):
            velocity = 0.9 * velocity + (i == j)
            weight += velocity
            a[i, j] = weight
    errors = dense_errors(strategy.materialize(), a)
    np.testing.assert_allclose(strategy.per_step_error(), errors, rtol=1e-9)
    plain = BlockDiagonalStrategy(BlockDiagonalStrategy.optimize(n, 3, 5).block, n, workload)
    assert strategy.loss() < plain.loss()


def test_config_goes_through_json_exactly():
    strategy = BlockDiagonalStrategy.optimize(23, 4, 5, max_iterations=5)
    restored = strategies.from_config(json.loads(json.dumps(strategy.get_config())))
    assert restored == strategy and hash(restored) == hash(strategy)
    np.testing.assert_array_equal(restored.noise_rows(), strategy.noise_rows())
    assert restored != BlockDiagonalStrategy(strategy.block, 24)
    with pytest.raises(ValueError, match="keys"):
        strategies.from_config({"class_name": "BlockDiagonalStrategy", "num_steps": 3})


@pytest.mark.parametrize(
    "arguments",
    [(20, 6, 5), (4, 2, 5), (20, 0, 5), (20, 2.0, 5), (20, 2, True), (20, 3, 5, "median")],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises((TypeError, ValueError), match="Received"):
        BlockDiagonalStrategy.optimize(*arguments)


def test_a_block_that_is_no_banded_strategy_is_refused():
    toeplitz = strategies.ToeplitzStrategy.optimize(5, 2)
    with pytest.raises(TypeError, match="Expected `block`"):
        BlockDiagonalStrategy(toeplitz, 20)
    with pytest.raises(ValueError, match="num_steps"):
        BlockDiagonalStrategy(strategies.BandedStrategy.optimize(5, 2), 4)
