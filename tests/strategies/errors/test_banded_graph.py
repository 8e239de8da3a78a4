"""The TensorFlow graph against the NumPy recursion and dense linear algebra."""

import numpy as np
import pytest

from keras_bandmf.strategies import BandedStrategy, Workload
from keras_bandmf.strategies.errors.banded import BandedErrors, block_size
from keras_bandmf.strategies.errors.banded_graph import GraphErrors
from tests.strategies import reference
from tests.strategies.errors.test_banded import random_columns

SIZES = [(1, 1), (5, 1), (2, 2), (5, 3), (33, 2), (50, 7), (64, 64), (200, 17)]


def workload_of(name, n):
    if name == "prefix sums":
        return Workload(n)
    rates = np.linspace(0.2, 0.1, n)
    return Workload(n, learning_rates=rates, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("name", ["prefix sums", "momentum and decay"])
@pytest.mark.parametrize("n,b", SIZES)
def test_it_agrees_with_numpy(n, b, name):
    blocks = workload_of(name, n).blocks(block_size(b))
    columns = random_columns(n, b)
    weights = np.random.default_rng(1).standard_normal(n)
    graph, plain = GraphErrors(n, b, blocks), BandedErrors(n, b, blocks)
    np.testing.assert_allclose(graph.evaluate(columns), plain.evaluate(columns), rtol=1e-10)
    expected = plain.gradient(weights)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(graph.gradient(weights), expected, atol=1e-10 * scale)


def test_it_agrees_with_the_dense_matrix():
    n, b = 50, 7
    columns = random_columns(n, b)
    graph = GraphErrors(n, b, Workload(n).blocks(block_size(b)))
    expected = reference.dense_errors(reference.dense_columns(columns))
    np.testing.assert_allclose(graph.evaluate(columns), expected, rtol=1e-10)


def test_a_search_by_the_graph_finds_the_same_strategy():
    plain = BandedStrategy.optimize(60, 5)
    graph = BandedStrategy.optimize(60, 5, solver="graph")
    np.testing.assert_allclose(graph.loss(), plain.loss(), rtol=1e-9)
    np.testing.assert_allclose(graph.columns, plain.columns, atol=1e-4)


def test_results_of_the_two_are_kept_apart(tmp_path):
    plain = BandedStrategy.optimize(20, 3, cache_dir=tmp_path)
    before = set(tmp_path.iterdir())
    BandedStrategy.optimize(20, 3, cache_dir=tmp_path, solver="graph")
    assert set(tmp_path.iterdir()) > before
    again = BandedStrategy.optimize(20, 3, cache_dir=tmp_path)
    np.testing.assert_array_equal(again.columns, plain.columns)


def test_other_solvers_are_refused():
    with pytest.raises(ValueError, match="Received: solver='gpu'"):
        BandedStrategy.optimize(20, 3, solver="gpu")
