"""The columns of C that the attacker filters by, of every kind of strategy that a plan takes."""

import types

import numpy as np
import pytest

from keras_bandmf import strategies
from keras_bandmf.audit import released


@pytest.mark.parametrize(
    "strategy",
    [
        strategies.ToeplitzStrategy.optimize(num_steps=20, num_bands=5),
        strategies.BandedStrategy.optimize(num_steps=20, num_bands=4),
        strategies.BlockDiagonalStrategy.optimize(num_steps=20, num_bands=4, block_steps=8),
        strategies.BandedInverseStrategy.square_root(20, num_inverse_bands=3),
        strategies.ToeplitzStrategy([1.0], num_steps=20),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_columns_are_those_of_the_dense_matrix(strategy):
    plan = types.SimpleNamespace(strategy=strategy, num_steps=strategy.num_steps)
    columns = released._columns(plan)
    dense = np.zeros((20, 20))
    for j, column in enumerate(columns):
        below = min(len(column), 20 - j)
        dense[j : j + below, j] = column[:below]
        assert not np.any(column[below:])
    np.testing.assert_allclose(dense, strategy.materialize(), rtol=1e-12, atol=1e-14)


def test_the_columns_of_a_long_run_need_no_dense_matrix():
    strategy = strategies.ToeplitzStrategy([0.8, 0.6], num_steps=200_000)
    plan = types.SimpleNamespace(strategy=strategy, num_steps=strategy.num_steps)
    columns = released._columns(plan)
    assert columns.shape == (200_000, 2)
    assert np.all(columns[:-1] == [0.8, 0.6])
    assert columns[-1, 1] == 0.0
