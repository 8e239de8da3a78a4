"""Sensitivity against brute force over every pattern, and the bounds from above."""

import math

import numpy as np
import pytest

from keras_bandmf.strategies import (
    BandedStrategy,
    ToeplitzStrategy,
    participation,
    sensitivity,
)
from keras_bandmf.strategies.toeplitz import square_root_coefficients
from tests.strategies import reference
from tests.strategies.gram import gram_bound

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
    # Column-normalized, or not falling: the evenly spaced formula would be too small here.
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
    # Why the normalized matrix takes the upper bound: DESIGN's one per cent.
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
            expected = gram_bound(matrix.T @ matrix, k, separation)
            assert s.sensitivity(k, separation) == pytest.approx(expected, rel=1e-12)


def test_max_separated_sum_against_every_pattern():
    values = np.random.default_rng(0).random((5, 9))
    for k in (1, 2, 3, 20):
        for separation in (1, 2, 4, 9, 12):
            found = participation.max_separated_sum(values, k, separation)
            for row, value in zip(values, found, strict=True):
                best = max(row[list(p)].sum() for p in reference.patterns(9, min(k, 9), separation))
                assert value == pytest.approx(best, rel=1e-13)


def test_known_values():
    assert participation.max_separated_sum(np.array([1, 0.5, 0.5, 0.5, 0.1]), 5, 1) == 2.6
    matrix = np.array([[1, 0, 0, 0], [2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, -6]], np.float64)
    gram = matrix.T @ matrix
    assert gram_bound(gram, 4, 2) == pytest.approx(math.sqrt(41))
    assert gram_bound(gram, 4, 3) == pytest.approx(math.sqrt(41))
    assert gram_bound(gram, 1, 1) == pytest.approx(6.0)


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
    s = ToeplitzStrategy(square_root_coefficients(20_000), 20_000)
    with pytest.raises(ValueError, match="num_bands=20000, min_separation=1000"):
        s.sensitivity(8, 1000)
    assert s.sensitivity(2, 20_000) == 1.0
    raw = ToeplitzStrategy(s.coefficients, 20_000, column_normalize=False)
    assert raw.sensitivity(8, 1000) > math.sqrt(8)


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "2", None])
def test_bad_schema(bad):
    s = ToeplitzStrategy(FALLING, 10)
    with pytest.raises((TypeError, ValueError), match="max_participations"):
        s.sensitivity(max_participations=bad, min_separation=5)
    with pytest.raises((TypeError, ValueError), match="min_separation"):
        s.sensitivity(max_participations=2, min_separation=bad)
    with pytest.raises((TypeError, ValueError), match="fixed_order"):
        s.sensitivity(2, 3, fixed_order=1)


# (steps, participations, separation) with every pattern in reach of brute force.
SCHEMAS = [(32, 5, 7), (32, 4, 6), (31, 3, 4), (20, 4, 3), (16, 5, 2), (10, 4, 1), (9, 9, 4)]


@pytest.mark.parametrize("n,k,separation", SCHEMAS)
@pytest.mark.parametrize("bands", [3, 9, 14])
def test_exact_for_every_pattern_where_nothing_is_negative(n, k, separation, bands):
    bands = min(n, bands)
    rng = np.random.default_rng(bands)
    columns = 0.02 + rng.random((n, bands))
    for s in (
        ToeplitzStrategy(square_root_coefficients(bands), n),
        ToeplitzStrategy(columns[0], n),
        ToeplitzStrategy(columns[0], n, column_normalize=False),
        BandedStrategy(columns),
    ):
        matrix = s.materialize()
        allowed = reference.patterns(n, k, separation)
        expected = reference.largest_gram_sum(matrix, allowed)
        got = s.sensitivity(k, separation)
        assert got == pytest.approx(expected, rel=1e-12)
        assert gram_bound(matrix.T @ matrix, k, separation) == pytest.approx(got)
        allowed = reference.fixed_order_patterns(n, min(k, -(-n // separation)), separation)
        expected = reference.largest_gram_sum(matrix, allowed)
        got = s.sensitivity(k, separation, fixed_order=True)
        assert got == pytest.approx(expected, rel=1e-12)
        gram = matrix.T @ matrix
        assert gram_bound(gram, k, separation, True) == pytest.approx(got)


@pytest.mark.parametrize("n,k,separation", SCHEMAS)
def test_bounds_are_never_below_what_they_bound(n, k, separation, monkeypatch):
    # As if the exact search were too dear.
    monkeypatch.setattr(sensitivity, "is_affordable", lambda *_: False)
    rng = np.random.default_rng(n)
    for bands in (3, 7, 9):
        for columns in (0.02 + rng.random((n, bands)), rng.standard_normal((n, bands))):
            columns[:, 0] = np.abs(columns[:, 0])
            for s in (
                ToeplitzStrategy(columns[0], n),
                ToeplitzStrategy(columns[0], n, column_normalize=False),
                BandedStrategy(columns),
            ):
                allowed = reference.patterns(n, k, separation)
                truth = reference.largest_gram_sum(s.materialize(), allowed)
                raw = isinstance(s, ToeplitzStrategy) and not s.column_normalize
                if raw:  # bounded through falling coefficients too: by all signs
                    truth = reference.brute_force_sensitivity(s.materialize(), 2, separation)
                assert s.sensitivity(k, separation) >= truth * (1 - 1e-12)


def test_signs_never_exceed_what_is_returned():
    rng = np.random.default_rng(7)
    for _ in range(20):
        columns = rng.standard_normal((10, 6))
        columns[:, 0] = np.abs(columns[:, 0])
        s = BandedStrategy(columns)
        for k, separation in [(2, 3), (3, 2), (4, 2)]:
            truth = reference.brute_force_sensitivity(s.materialize(), k, separation)
            assert s.sensitivity(k, separation) >= truth * (1 - 1e-12)


def test_a_later_start_with_one_participation_less_can_be_the_worst_in_fixed_order():
    # Steps 0, 2, 4 share no row of C; steps 1, 3 share row 3 and are no part of a longer pattern.
    columns = np.array([[1.0, 0, 0], [0.1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    s = BandedStrategy(columns)
    matrix = s.materialize()
    truth = np.linalg.norm(matrix[:, 1] + matrix[:, 3])
    assert truth > 1.1 * np.sqrt(3)
    for count in (3, 9):
        assert s.sensitivity(count, 2, fixed_order=True) == pytest.approx(truth, rel=1e-12)
    got = gram_bound(matrix.T @ matrix, 3, 2, fixed_order=True)
    assert got == pytest.approx(truth, rel=1e-12)
    # Where more would fit than take part, every shorter pattern is part of a longer one.
    assert s.sensitivity(2, 2, fixed_order=True) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n,b,k,separation", [(200, 9, 30, 4), (150, 9, 8, 4), (90, 5, 90, 1)])
def test_fixed_order_of_many_participations(n, b, k, separation, normalize):
    coefficients = np.random.default_rng(b).random(b) + 0.1
    s = ToeplitzStrategy(coefficients, n, normalize)
    matrix = s.materialize()
    expected = gram_bound(matrix.T @ matrix, k, separation, fixed_order=True)
    got = s.sensitivity(k, separation, fixed_order=True)
    assert got == pytest.approx(expected, rel=1e-12)
    assert got <= s.sensitivity(k, separation) * (1 + 1e-12)


def test_fixed_order_of_a_billion_steps():
    s = ToeplitzStrategy(square_root_coefficients(100), 10**9)
    got = s.sensitivity(1000, 40, fixed_order=True)
    raw = ToeplitzStrategy(s.coefficients, 10**9, column_normalize=False)
    assert got == pytest.approx(raw.sensitivity(1000, 40, fixed_order=True), rel=1e-3)


def test_the_dynamic_program_is_affordable_when_few_participations_meet():
    assert participation.is_affordable(10**4, 63, 8, 40)
    assert not participation.is_affordable(10**6, 1023, 1000, 8)
    assert participation.separated_work(10**12, 10**6, 5, 1) == math.inf
