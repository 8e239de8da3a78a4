"""The start of a long search: three short problems in place of the Toeplitz optimum."""

import numpy as np
import pytest

from keras_bandmf.strategies import BandedStrategy, ToeplitzStrategy
from keras_bandmf.strategies.long_start import is_long, long_start
from keras_bandmf.strategies.search.banded import normalize_columns, weighted_mean

N, B = 17_000, 3


@pytest.fixture(scope="module")
def from_toeplitz():
    """The Toeplitz loss, what a search from there finds, and its iterations."""
    toeplitz = ToeplitzStrategy.optimize(N, B)
    steps = []
    found = BandedStrategy.optimize(N, B, start=toeplitz, callback=steps.append)
    return toeplitz.loss(), found.loss(), len(steps)


def test_the_start_is_where_a_search_from_toeplitz_ends(from_toeplitz):
    toeplitz, optimum, _ = from_toeplitz
    start = BandedStrategy(long_start(N, B, 1e-9))
    assert start.loss() / optimum - 1 < 1e-3 * (toeplitz / optimum - 1)


def test_a_long_search_is_shorter_and_ends_no_higher(from_toeplitz):
    toeplitz, optimum, iterations = from_toeplitz
    steps = []
    found = BandedStrategy.optimize(N, B, callback=steps.append)
    assert len(steps) < iterations / 2
    assert found.loss() <= optimum * (1 + 1e-9)
    assert found.loss() < toeplitz


def test_a_start_worse_than_toeplitz_is_not_used(monkeypatch):
    # Columns of one entry: the identity, far worse.
    poor = normalize_columns(np.eye(1, B).repeat(N, axis=0))
    monkeypatch.setattr("keras_bandmf.strategies.banded.long_start", lambda *_: poor)
    toeplitz = ToeplitzStrategy.optimize(N, B)
    with pytest.warns(RuntimeWarning, match="max_iterations"):
        found = BandedStrategy.optimize(N, B, max_iterations=1)
    assert found.loss() <= toeplitz.loss() * (1 + 1e-12)


@pytest.mark.parametrize(
    ("num_steps", "num_bands", "expected"),
    [
        (16_384, 8, True),
        (16_383, 8, False),
        (10**6, 1, False),
        (10**6, 64, True),
        (50_000, 256, False),
    ],
)
def test_only_long_runs_have_a_middle(num_steps, num_bands, expected):
    assert is_long(num_steps, num_bands) is expected


def test_other_objectives_start_from_toeplitz(monkeypatch):
    def refuse(*_):
        raise RuntimeError("not for this objective")

    monkeypatch.setattr("keras_bandmf.strategies.banded.long_start", refuse)
    with pytest.warns(RuntimeWarning, match="max_iterations"):
        BandedStrategy.optimize(N, 2, error="max", max_iterations=1)


def test_the_weighted_mean_has_the_gradient_it_says():
    rng = np.random.default_rng(0)
    errors, weights = rng.uniform(1, 2, 7), rng.uniform(1, 9, 7)
    value, gradient = weighted_mean(errors, weights)
    np.testing.assert_allclose(value, np.log(np.average(errors, weights=weights)), rtol=1e-14)
    for i in range(7):
        moved = errors + 1e-6 * (np.arange(7) == i)
        slope = (weighted_mean(moved, weights)[0] - value) / 1e-6
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-5)
