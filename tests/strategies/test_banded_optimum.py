"""The optimum of banded strategies: reference values, never worse than the start, kept promises."""

import numpy as np
import pytest

from keras_bandmf.strategies import BandedStrategy, ToeplitzStrategy
from tests.strategies import reference

# notes: root of the mean loss, L-BFGS on the dense objective.
RMSE = [
    (16, 4, 1.902896),
    (16, 16, 1.689404),
    (64, 8, 2.620517),
    (64, 64, 2.099856),
    (128, 16, 2.818767),
    (128, 64, 2.349999),
    (256, 16, 3.586968),
    (256, 64, 2.709558),
    (512, 8, 6.117919),
    (512, 32, 3.789763),
    (1024, 2, 16.101149),
    (1024, 8, 8.414708),
    (1024, 16, 6.298837),
    (1024, 32, 4.898304),
    (4096, 2, 32.076651),
    (4096, 8, 16.332801),
]


@pytest.mark.parametrize("n,b,expected", RMSE)
def test_table_of_optima_is_met(n, b, expected):
    # Both sides are upper bounds on the optimum, to about 1e-7.
    assert np.sqrt(BandedStrategy.optimize(n, b).loss()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "n,b,expected",
    [
        (2048, 8, 11.685663),
        (2048, 16, 8.586683),
        (2048, 32, 6.492694),
        (4096, 16, 11.847438),
        (4096, 32, 8.774243),
    ],
)
def test_table_of_optima_is_met_at_many_steps(n, b, expected):
    assert np.sqrt(BandedStrategy.optimize(n, b).loss()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "n,b,expected",
    [(256, 256, 2.524414), (512, 128, 2.922500), (1024, 64, 3.997715), (2048, 64, 5.103662)],
)
def test_table_of_optima_is_met_with_many_bands(n, b, expected):
    # Their iterations are dear, and this gain is enough for the six digits of the table.
    found = BandedStrategy.optimize(n, b, gain=1e-7)
    assert np.sqrt(found.loss()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n,b,loss", [(500, 8, 36.6374), (1000, 16, 38.8638)])
def test_design_values(n, b, loss):
    assert BandedStrategy.optimize(n, b).loss() == pytest.approx(loss, abs=6e-5)


@pytest.mark.slow
def test_ten_thousand_steps():
    assert BandedStrategy.optimize(10_000, 32).loss() < 174.1488 + 5e-5


@pytest.mark.parametrize("error", ["mean", "max"])
@pytest.mark.parametrize("n,b", [(2, 2), (8, 2), (64, 64), (100, 8), (300, 20)])
def test_never_worse_than_the_toeplitz_strategy(n, b, error):
    toeplitz = ToeplitzStrategy.optimize(n, b, error)
    banded = BandedStrategy.optimize(n, b, error, max_iterations=3000)
    assert banded.loss(error) <= toeplitz.loss(error) * (1 + 1e-14)


def test_the_gradient_vanishes_at_the_optimum():
    n, b = 60, 7
    s = BandedStrategy.optimize(n, b, gain=1e-13)
    dense = reference.dense_error_gradient(s.materialize(), np.tri(n), np.full(n, 1 / n))
    gradient = reference.band_of(dense, b)
    gradient -= s.columns * np.sum(gradient * s.columns, axis=1, keepdims=True)
    assert np.max(np.abs(gradient)) < 1e-6 * s.loss()


def test_the_largest_error_is_shared_by_many_rows_at_its_optimum():
    s = BandedStrategy.optimize(100, 8, "max", max_iterations=3000)
    errors = s.per_step_error()
    # Convex problem in C'C (Lagrange: several rows bind); 15.827 is the best Toeplitz strategy.
    assert s.loss("max") < 14.11
    assert np.sum(errors > 0.99 * np.max(errors)) > 10
    assert BandedStrategy.optimize(100, 8).loss("max") > s.loss("max")


def test_the_optimum_does_not_depend_on_the_start():
    random = np.random.default_rng(5)
    start = np.abs(random.standard_normal((50, 6))) + 3.0 * (np.arange(6) == 0)
    found = BandedStrategy.optimize(50, 6, start=BandedStrategy(start), gain=1e-12)
    assert found.loss() == pytest.approx(BandedStrategy.optimize(50, 6).loss(), rel=1e-7)


def test_running_out_of_iterations_warns_and_returns_what_can_be_gone_on_from():
    with pytest.warns(RuntimeWarning, match="Pass it as `start`"):
        part = BandedStrategy.optimize(200, 8, max_iterations=3)
    whole = BandedStrategy.optimize(200, 8)
    assert whole.loss() < part.loss() < ToeplitzStrategy.optimize(200, 8).loss()
    resumed = BandedStrategy.optimize(200, 8, start=part)
    assert resumed.loss() == pytest.approx(whole.loss(), rel=1e-7)


def test_progress():
    seen = []
    s = BandedStrategy.optimize(100, 8, callback=seen.append)
    values = [progress.value for progress in seen]
    assert values == sorted(values, reverse=True)
    assert np.exp(values[-1]) == pytest.approx(s.loss(), rel=1e-12)


def test_search_is_deterministic():
    assert BandedStrategy.optimize(200, 8) == BandedStrategy.optimize(200, 8)
