"""Sensitivity against brute force over every pattern, and the bounds from above."""

import math

import numpy as np
import pytest

from keras_bandmf.strategies import ToeplitzStrategy, sensitivity
from keras_bandmf.strategies.toeplitz import square_root_coefficients
from tests.strategies import reference

FALLING = square_root_coefficients(4)
RISING = np.array([1.0, 0.5, 0.8])
MIXED = np.array([1.0, -0.5, 0.3, 0.2])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("coefficients", [FALLING, RISING, MIXED, np.array([2.0])])
def test_exact_when_bands_do_not_exceed_the_separation(coefficients, normalize):
    for n in (4, 7, 10):
        s = ToeplitzStrategy(coefficients, n, normalize)
        for k in (1, 2, 3):
            for separation in range(s.num_bands, n + 2):
                expected = reference.brute_force_sensitivity(s.materialize(), k, separation)
                got = s.sensitivity(k, separation)
                assert got == pytest.approx(expected, rel=1e-12), (n, k, separation)


def test_square_root_of_the_participations_that_fit():
    s = ToeplitzStrategy(FALLING, 32)
    assert s.sensitivity(100, 4) == math.sqrt(8)
    assert s.sensitivity(6, 4) == math.sqrt(6)
    assert s.sensitivity(6, 40) == s.sensitivity(1) == s.sensitivity() == 1.0


def test_exact_for_raw_falling_coefficients_with_more_bands_than_the_separation():
    for n in (5, 8, 11):
        for b in (2, 4, 5):
            s = ToeplitzStrategy(square_root_coefficients(b), n, column_normalize=False)
            for k in (2, 3, 4):
                for separation in range(1, b):
                    expected = reference.brute_force_sensitivity(s.materialize(), k, separation)
                    assert s.sensitivity(k, separation) == pytest.approx(expected, rel=1e-12)


def test_never_below_brute_force_with_more_bands_than_the_separation():
    # Column-normalised, or not falling: the evenly spaced formula would be too small here.
    rng = np.random.default_rng(3)
    vectors = [FALLING, RISING, MIXED, np.ones(3), *rng.standard_normal((6, 4))]
    for vector in vectors:
        vector[0] = abs(vector[0])
        for normalize in (True, False):
            for n in (4, 6, 9):
                s = ToeplitzStrategy(vector, n, normalize)
                for k, separation in [(2, 1), (3, 1), (2, 2), (3, 2), (4, 1)]:
                    expected = reference.brute_force_sensitivity(s.materialize(), k, separation)
                    assert s.sensitivity(k, separation) >= expected * (1 - 1e-12)


def test_the_evenly_spaced_formula_is_too_small_for_normalised_columns():
    # Why the normalised matrix takes the upper bound: DESIGN's one per cent.
    raw = ToeplitzStrategy(square_root_coefficients(6), 8, column_normalize=False)
    normalized = ToeplitzStrategy(square_root_coefficients(6), 8)
    truth = reference.brute_force_sensitivity(normalized.materialize(), 3, 3)
    assert raw.sensitivity(3, 3) < truth * 0.995
    assert normalized.sensitivity(3, 3) >= truth


def test_evenly_spaced_over_many_periods_is_the_sum_of_columns():
    for n, b, k, separation in [(100, 7, 30, 3), (101, 7, 1000, 3), (50, 50, 6, 8), (64, 9, 64, 1)]:
        s = ToeplitzStrategy(square_root_coefficients(b), n, column_normalize=False)
        starts = np.arange(min(k, -(-n // separation))) * separation
        expected = np.linalg.norm(s.materialize()[:, starts].sum(axis=1))
        assert s.sensitivity(k, separation) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_upper_bound_is_that_of_the_whole_gram_matrix(normalize):
    for vector in (MIXED, np.array([1.0, 0.2, 0.9])):
        s = ToeplitzStrategy(vector, 60, normalize)
        matrix = s.materialize()
        for k, separation in [(2, 1), (5, 2), (60, 1), (60, 2)]:
            expected = sensitivity.gram_bound(matrix.T @ matrix, k, separation)
            assert s.sensitivity(k, separation) == pytest.approx(expected, rel=1e-12)


def test_max_separated_sum_against_every_pattern():
    values = np.random.default_rng(0).random((5, 9))
    for k in (1, 2, 3, 20):
        for separation in (1, 2, 4, 9, 12):
            found = sensitivity.max_separated_sum(values, k, separation)
            for row, value in zip(values, found, strict=True):
                best = max(row[list(p)].sum() for p in reference.patterns(9, min(k, 9), separation))
                assert value == pytest.approx(best, rel=1e-13)


def test_known_values():
    assert sensitivity.max_separated_sum(np.array([1, 0.5, 0.5, 0.5, 0.1]), 5, 1) == 2.6
    matrix = np.array([[1, 0, 0, 0], [2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, -6]], np.float64)
    gram = matrix.T @ matrix
    assert sensitivity.gram_bound(gram, 4, 2) == pytest.approx(math.sqrt(41))
    assert sensitivity.gram_bound(gram, 4, 3) == pytest.approx(math.sqrt(41))
    assert sensitivity.gram_bound(gram, 1, 1) == pytest.approx(6.0)


def test_a_billion_steps():
    raw = ToeplitzStrategy(FALLING, 10**9, column_normalize=False)
    assert raw.sensitivity(1000, 10**6) == math.sqrt(1000)
    # 4 bands on separation 2: every inner row sees two columns.
    c = raw.coefficients
    inner = (c[0] + c[2]) ** 2 + (c[1] + c[3]) ** 2
    assert raw.sensitivity(10**6, 2) == pytest.approx(math.sqrt(10**6 * inner), rel=1e-6)
    normalized = ToeplitzStrategy(FALLING, 10**9)
    assert normalized.sensitivity(10**6, 2) >= raw.sensitivity(10**6, 2)


def test_a_bound_of_too_many_bands_is_refused():
    s = ToeplitzStrategy(square_root_coefficients(1025), 10_000)
    with pytest.raises(ValueError, match="num_bands=1025.*min_separation=1000"):
        s.sensitivity(2, 1000)
    assert s.sensitivity(2, 1025) == math.sqrt(2)


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "2", None])
def test_bad_schema(bad):
    s = ToeplitzStrategy(FALLING, 10)
    with pytest.raises(ValueError, match="max_participations"):
        s.sensitivity(max_participations=bad, min_separation=5)
    with pytest.raises(ValueError, match="min_separation"):
        s.sensitivity(max_participations=2, min_separation=bad)
