"""The variances of the noise against the rows of a dense inverse."""

import numpy as np
import pytest

from keras_bandmf import strategies
from keras_bandmf.strategies.noise_variances import noise_variances

STEPS = 45


def trainable():
    """Strategies of every class that a plan takes, with one band, several, and a last cut block."""
    random = np.random.default_rng(0)
    columns = random.uniform(-0.4, 0.4, (STEPS, 5))
    columns[:, 0] = random.uniform(0.5, 1.0, STEPS)
    block = strategies.BandedStrategy(columns[:10, :3] + 0.1)
    toeplitz = np.array([0.8, 0.5, 0.2, 0.1])
    return {
        "identity": strategies.ToeplitzStrategy([1.0], STEPS),
        "toeplitz": strategies.ToeplitzStrategy(toeplitz, STEPS),
        "raw toeplitz": strategies.ToeplitzStrategy(toeplitz, STEPS, column_normalize=False),
        "as many bands as steps": strategies.ToeplitzStrategy.square_root(STEPS, STEPS),
        "banded": strategies.BandedStrategy(columns),
        "one band": strategies.BandedStrategy(columns[:, :1]),
        "blocks": strategies.BlockDiagonalStrategy(block, STEPS),
        "inverse": strategies.BandedInverseStrategy([1.0, -0.6, -0.1], STEPS),
        "one step": strategies.ToeplitzStrategy([1.0], 1),
    }


@pytest.mark.parametrize("name", trainable())
def test_variances_are_the_squared_norms_of_the_rows_of_the_inverse(name):
    strategy = trainable()[name]
    inverse = np.linalg.inv(strategy.materialize())
    found = noise_variances(strategy)
    assert found.shape == (strategy.num_steps,) and found.dtype == np.float64
    np.testing.assert_allclose(found, np.sum(np.square(inverse), axis=1), rtol=1e-10)


def test_a_million_steps_are_no_obstacle():
    """The variance of a stationary AR(1) process, away from both ends."""
    variances = noise_variances(strategies.ToeplitzStrategy([0.8, 0.6], 10**6))
    np.testing.assert_allclose(variances[1000:-1], 1 / (0.64 - 0.36), rtol=1e-9)
    assert variances[0] == pytest.approx(1 / 0.64)


def test_an_inverse_that_overflows_is_infinite():
    growing = strategies.ToeplitzStrategy([0.1, 0.99], 2000)
    assert np.isinf(noise_variances(growing)[-1]) and not np.isnan(noise_variances(growing)).any()


def test_strategies_that_no_plan_takes_are_refused():
    with pytest.raises(NotImplementedError, match="banded"):
        noise_variances(strategies.TreeStrategy(STEPS))
