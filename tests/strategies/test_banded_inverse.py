"""Banded inverses: against dense matrices and every pattern; what is not known is refused."""

import json
import math

import numpy as np
import pytest

from keras_bandmf import strategies
from keras_bandmf.strategies import BandedInverseStrategy, ToeplitzStrategy
from tests.strategies import reference


def some(num_steps):
    few = min(num_steps, 3)
    return [
        BandedInverseStrategy.square_root(num_steps, 1),
        BandedInverseStrategy.square_root(num_steps, few),
        BandedInverseStrategy.square_root(num_steps, num_steps),
        BandedInverseStrategy([2.0, -1.8][:few], num_steps),
        BandedInverseStrategy.optimize(num_steps, few, 2, max(1, num_steps // 2)),
    ]


def dense(strategy):
    """C from the taps alone: the inverse of a dense C^-1, scaled to its first column."""
    n, taps = strategy.num_steps, strategy.inverse_coefficients
    inverse = sum(tap * np.eye(n, k=-lag) for lag, tap in enumerate(taps))
    matrix = np.linalg.inv(inverse)
    return matrix / np.linalg.norm(matrix[:, 0])


@pytest.mark.parametrize("n", [1, 2, 5, 64, 200])
def test_matrix_and_errors_are_those_of_the_dense_inverse(n):
    for s in some(n):
        matrix = dense(s)
        np.testing.assert_allclose(s.materialize(), matrix, atol=1e-13)
        np.testing.assert_allclose(s.per_step_error(), reference.dense_errors(matrix), rtol=1e-10)
        taps = np.zeros(n)
        taps[: s.num_inverse_bands] = s.noise_taps()
        np.testing.assert_allclose(np.linalg.inv(matrix)[:, 0], taps, atol=1e-12)
        assert s.num_bands == (1 if s.num_inverse_bands == 1 else n)


def test_square_root_coefficients():
    np.testing.assert_allclose(
        BandedInverseStrategy.square_root(9, 5).inverse_coefficients,
        [1.0, -1 / 2, -1 / 8, -1 / 16, -5 / 128],
        rtol=1e-15,
    )
    root = ToeplitzStrategy.square_root(50, column_normalize=False)
    full = BandedInverseStrategy.square_root(50, 50)
    assert full.loss() == pytest.approx(root.loss(), rel=1e-12)


@pytest.mark.parametrize(
    "n,k,separation", [(12, 3, 3), (13, 13, 3), (16, 4, 4), (16, 3, 5), (24, 3, 6)]
)
def test_sensitivity_is_that_of_the_worst_pattern(n, k, separation):
    """Over every pattern at least `separation` apart; C >= 0, so contributions add up at worst."""
    for s in some(n):
        matrix = dense(s)
        allowed = reference.patterns(n, k, separation)
        truth = max(np.linalg.norm(matrix[:, pattern].sum(axis=1)) for pattern in allowed)
        assert s.sensitivity(k, separation) == pytest.approx(truth, rel=1e-12)
        assert truth * (1 + 1e-12) > reference.brute_force_sensitivity(
            matrix, min(k, 3), separation
        )


def test_a_million_steps():
    s = BandedInverseStrategy.square_root(10**6, 300)
    x = np.cumsum(s.inverse_coefficients)
    x = np.append(x, np.full(10**6 - 300, x[299]))
    c = s.first_column()
    np.testing.assert_allclose(s.per_step_error()[-1], np.sum(x**2) * np.sum(c**2), rtol=1e-10)
    assert 10.0 < s.sensitivity(100, 10**4) < 100.0


@pytest.mark.parametrize("error", ["mean", "max"])
@pytest.mark.parametrize("p,k", [(2, 1), (4, 5), (16, 5), (16, 1)])
def test_optimized_taps_are_the_best_of_a_grid(p, k, error):
    n, separation = 400, 80
    found = BandedInverseStrategy.optimize(n, p, k, separation, error)

    def rmse(strategy):
        return math.sqrt(strategy.loss(error)) * strategy.sensitivity(k, separation)

    best = rmse(BandedInverseStrategy.square_root(n, p))
    for gamma in np.linspace(0.05, 0.98, 32):
        terms = np.append(1.0, np.cumprod((np.arange(1, p) - 1 - gamma) / np.arange(1, p)))
        for damping in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0):
            try:
                best = min(best, rmse(BandedInverseStrategy(terms * damping ** np.arange(p), n)))
            except ValueError:
                continue
    assert rmse(found) <= best * 1.0005


def test_few_taps_do_better_than_as_many_bands():
    n, k = 1000, 10
    banded = math.sqrt(k * ToeplitzStrategy.optimize(n, 16).loss())
    s = BandedInverseStrategy.optimize(n, 4, k, n // k)
    assert math.sqrt(s.loss()) * s.sensitivity(k, n // k) < 0.8 * banded


def test_json_is_exact_and_values_compare():
    for s, other in zip(some(20), some(21), strict=True):
        back = strategies.from_config(json.loads(json.dumps(s.get_config())))
        assert back == s and hash(back) == hash(s)
        np.testing.assert_array_equal(back.noise_taps(), s.noise_taps())
        assert s != other and "num_inverse_bands=" in repr(s)
    with pytest.raises(ValueError, match="Received: config with"):
        strategies.from_config({**s.get_config(), "extra": 1})


@pytest.mark.parametrize(
    "taps",
    [
        [1.0, 0.5],  # C has negative entries
        [1.0, -1.1],  # C grows
        [1.0, 0.0, -0.5],  # C falls to 0 and rises again
        [1.0, -0.3, -0.6],
        [1.0, -1e-9, -0.5],
    ],
)
def test_a_column_that_rises_or_is_negative_is_refused(taps):
    with pytest.raises(ValueError, match="not to increase.*Received: inverse_coefficients="):
        BandedInverseStrategy(taps, 10)


@pytest.mark.parametrize(
    "taps", [[], [[1.0]], [0.0, 1.0], [-1.0], [1.0, np.nan], ["a"], None, 1.0, [[1.0], [1.0, 2.0]]]
)
def test_bad_taps(taps):
    with pytest.raises(ValueError, match="Expected `inverse_coefficients` to be a vector"):
        BandedInverseStrategy(taps, 10)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, None, 10**8 + 1])
def test_bad_steps_and_bands(bad):
    for make in (
        lambda: BandedInverseStrategy([1.0], bad),
        lambda: BandedInverseStrategy.square_root(bad, 1),
        lambda: BandedInverseStrategy.optimize(bad, 1),
    ):
        with pytest.raises((TypeError, ValueError), match="`num_steps`.*Received: num_steps="):
            make()
    for make in (BandedInverseStrategy.square_root, BandedInverseStrategy.optimize):
        with pytest.raises((TypeError, ValueError), match="num_inverse_bands|num_bands="):
            make(5, bad)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="num_bands=6, num_steps=5"):
        BandedInverseStrategy([1.0] + [-0.01] * 5, 5)
    for name, value in [("error", "rms"), ("max_participations", 0), ("min_separation", 0)]:
        with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
            BandedInverseStrategy.optimize(5, 2, **{name: value})
    with pytest.raises(ValueError, match="min_separation"):
        BandedInverseStrategy.optimize(5, 2, 2)
    with pytest.raises(NotImplementedError, match="noise_rows"):
        BandedInverseStrategy([1.0, -0.5], 5).noise_rows()
