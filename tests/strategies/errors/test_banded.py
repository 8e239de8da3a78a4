"""The covariance recursion against dense linear algebra: errors and gradients."""

import numpy as np
import pytest

from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from keras_bandmf.strategies.workload import Workload
from tests.strategies import reference

SIZES = [
    (1, 1),
    (5, 1),
    (2, 2),
    (5, 3),
    (33, 2),
    (50, 7),
    (64, 64),
    (100, 99),
    (200, 17),
    (200, 32),
]


def random_columns(n, b, seed=0):
    random = np.random.default_rng(seed)
    columns = random.standard_normal((n, b)) / b
    columns[:, 0] = 1.0 + random.random(n)
    return columns


def prefix_errors(n, b):
    return BandedErrors(n, b, Workload(n).blocks(block_size(b)))


@pytest.fixture(params=[False, True], ids=["one chunk", "a block a chunk"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr("keras_bandmf.strategies.errors.banded._CHUNK_NUMBERS", 1)


@pytest.mark.parametrize("n,b", SIZES)
def test_errors_are_those_of_the_dense_matrix(n, b, chunks):
    columns = random_columns(n, b)
    expected = reference.dense_errors(reference.dense_columns(columns))
    np.testing.assert_allclose(prefix_errors(n, b).evaluate(columns), expected, rtol=1e-11)


@pytest.mark.parametrize("error", ["mean", "max", "random"])
@pytest.mark.parametrize("n,b", SIZES)
def test_gradients_are_those_of_the_dense_matrix(n, b, error, chunks):
    columns = random_columns(n, b)
    errors = prefix_errors(n, b)
    found = errors.evaluate(columns)
    weights = {
        "mean": np.full(n, 1.0 / n),
        "max": (np.arange(n) == np.argmax(found)).astype(float),
        "random": np.random.default_rng(1).standard_normal(n),
    }[error]
    dense = reference.dense_error_gradient(reference.dense_columns(columns), np.tri(n), weights)
    expected = reference.band_of(dense, b)
    gradient = errors.gradient(weights)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-11 * np.max(np.abs(expected)))
    np.testing.assert_allclose(gradient, errors.gradient(weights), rtol=0)  # asked twice


def test_memory_of_one_matrix_does_not_reach_the_next():
    errors = prefix_errors(50, 7)
    first, second = random_columns(50, 7, 1), random_columns(50, 7, 2)
    alone = errors.evaluate(first)
    errors.evaluate(second)
    np.testing.assert_array_equal(errors.evaluate(first), alone)


def test_entries_below_the_last_row_have_no_effect():
    columns = random_columns(20, 6)
    expected = prefix_errors(20, 6).evaluate(columns)
    columns[-5:, 1:] += 100.0 * (np.arange(15, 20)[:, None] + np.arange(1, 6) >= 20)
    errors = prefix_errors(20, 6)
    np.testing.assert_array_equal(errors.evaluate(columns), expected)
    beyond = np.arange(20)[:, None] + np.arange(6) >= 20
    np.testing.assert_array_equal(errors.gradient(np.ones(20))[beyond], 0.0)


def test_twenty_thousand_steps_agree_with_the_recurrence_of_toeplitz_sums():
    n, c = 20_000, np.array([0.8, 0.5, 0.3, 0.1])
    errors = prefix_errors(n, 4).evaluate(np.tile(c, (n, 1)))
    expected = np.cumsum(reference.filtered_sums(c, n) ** 2)
    np.testing.assert_allclose(errors, expected, rtol=1e-11)


def test_overflow_is_not_finite_and_does_not_warn():
    columns = np.tile([1.0, -3.0], (2000, 1))
    errors = prefix_errors(2000, 2).evaluate(columns)
    assert np.isfinite(errors[100]) and not np.isfinite(errors[-1])
