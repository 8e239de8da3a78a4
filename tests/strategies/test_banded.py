"""BandedStrategy: its matrix, its errors, its noise, its sensitivity, its JSON, bad input."""

import dataclasses
import json

import numpy as np
import pytest

from keras_bandmf import strategies
from keras_bandmf.noise import CorrelatedNoise
from keras_bandmf.strategies import BandedStrategy, ToeplitzStrategy
from tests.strategies import reference
from tests.strategies.gram import gram_bound

SIZES = [(1, 1), (2, 1), (2, 2), (5, 5), (7, 2), (60, 59), (100, 8), (200, 32)]


def strategy(n, b, seed=0):
    random = np.random.default_rng(seed)
    columns = random.standard_normal((n, b)) / b
    columns[:, 0] = 1.0 + random.random(n)
    return BandedStrategy(columns)


@pytest.mark.parametrize("n,b", SIZES)
def test_matrix_is_banded_lower_triangular_and_of_column_norm_one(n, b):
    s = strategy(n, b)
    matrix = s.materialize()
    assert (s.num_steps, s.num_bands) == (n, b) and type(s.num_steps) is int
    np.testing.assert_array_equal(matrix, reference.dense_columns(s.columns))
    lag = np.subtract.outer(np.arange(n), np.arange(n))
    assert np.all(matrix[(lag < 0) | (lag >= b)] == 0.0)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=0), 1.0, rtol=1e-14)


def test_columns_are_what_was_given_over_their_norms():
    s = BandedStrategy([[1, 4], [2, 5], [3, 6]])
    expected = [[1, 4] / np.sqrt(17), [2, 5] / np.sqrt(29), [1, 0]]
    np.testing.assert_allclose(s.columns, expected, rtol=1e-15)
    for scale in (1e-300, 1e300):
        scaled = BandedStrategy(scale * np.array([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]))
        np.testing.assert_allclose(scaled.columns, expected, rtol=1e-15)


@pytest.mark.parametrize("n,b", SIZES)
def test_noise_rows_are_the_inverse_of_the_matrix(n, b):
    s = strategy(n, b)
    rows = s.noise_rows()
    assert rows.shape == (n, b) and rows.dtype == np.float64 and s.tail_scale().shape == (0,)
    released = np.zeros((n, n))
    for i in range(n):
        past = sum(rows[i, k] * released[i - k] for k in range(1, min(i, b - 1) + 1))
        released[i] = (np.eye(n)[i] - past) / rows[i, 0]
    np.testing.assert_allclose(s.materialize() @ released, np.eye(n), atol=1e-11)


def test_the_noise_room_computes_the_inverse_of_the_matrix():
    n, b = 40, 6
    noise = [
        CorrelatedNoise(s, stddev=1.0, shapes=[(300,)], seed=3)
        for s in (strategy(n, b), BandedStrategy(np.ones((n, 1))))
    ]
    correlated, white = (
        np.array([stream.next()[0].numpy() for _ in range(n)], np.float64) for stream in noise
    )
    expected = np.linalg.solve(strategy(n, b).materialize(), white)
    np.testing.assert_allclose(correlated, expected, atol=2e-5)


@pytest.mark.parametrize("n,b", SIZES)
def test_errors_are_those_of_the_dense_matrix(n, b):
    s = strategy(n, b)
    expected = reference.dense_errors(s.materialize())
    np.testing.assert_allclose(s.per_step_error(), expected, rtol=1e-10)
    np.testing.assert_allclose(s.loss("mean"), np.mean(expected), rtol=1e-10)
    np.testing.assert_allclose(s.loss("max"), np.max(expected), rtol=1e-10)


def test_a_toeplitz_strategy_as_a_banded_one_has_its_errors():
    toeplitz = ToeplitzStrategy.optimize(300, 9)
    banded = BandedStrategy(np.tile(toeplitz.coefficients, (300, 1)))
    np.testing.assert_allclose(banded.per_step_error(), toeplitz.per_step_error(), rtol=1e-11)


def test_one_band_is_the_identity():
    s = BandedStrategy.optimize(9, 1)
    np.testing.assert_array_equal(s.materialize(), np.eye(9))
    assert s.loss("mean") == 5.0 and s.loss("max") == 9.0


def test_overflow_reads_as_infinity():
    s = BandedStrategy(np.tile([1.0, -3.0], (2000, 1)))
    assert s.loss("mean") == s.loss("max") == np.inf
    assert not np.any(np.isnan(s.per_step_error()))


@pytest.mark.parametrize("participations", [1, 2, 3])
@pytest.mark.parametrize("separation", [1, 2, 3, 5, 12])
def test_sensitivity_is_never_below_brute_force(participations, separation):
    for seed in range(3):
        s = strategy(12, 4, seed)
        exact = reference.brute_force_sensitivity(s.materialize(), participations, separation)
        found = s.sensitivity(participations, separation)
        assert found >= exact * (1 - 1e-12)
        if separation >= 4:
            assert found == pytest.approx(exact, rel=1e-12)


def test_sensitivity_values():
    s = strategy(32, 4)
    assert s.sensitivity() == s.sensitivity(1) == s.sensitivity(5, 32) == 1.0
    assert s.sensitivity(100, 4) == pytest.approx(np.sqrt(8))
    assert s.sensitivity(6, 4) == pytest.approx(np.sqrt(6))
    with pytest.raises(ValueError, match="Expected `min_separation` to be an integer"):
        s.sensitivity(2)


def test_the_bound_is_that_of_the_dense_gram_matrix():
    s = strategy(40, 7)
    gram = s.materialize().T @ s.materialize()
    for k, separation in [(3, 2), (9, 3), (40, 1)]:
        expected = gram_bound(gram, k, separation)
        assert s.sensitivity(k, separation) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n,b", [(1, 1), (10, 3), (300, 32)])
def test_json_is_exact(n, b):
    for seed in range(10):
        s = strategy(n, b, seed)
        back = strategies.from_config(json.loads(json.dumps(s.get_config())))
        assert back == s and hash(back) == hash(s) and type(back) is BandedStrategy
        assert back.columns.tobytes() == s.columns.tobytes()


def damaged(**changes):
    return {**strategy(6, 2).get_config(), **changes}


@pytest.mark.parametrize(
    "config",
    [
        {"class_name": "BandedStrategy"},
        damaged(extra=1),
        damaged(num_steps=5),
        damaged(num_steps=6.0),
        damaged(num_bands=3),
        damaged(num_bands=0),
        damaged(columns=strategy(6, 2).get_config()["columns"][:-4]),
        damaged(columns="A" + strategy(6, 2).get_config()["columns"][1:]),
        damaged(columns="not base64!"),
        damaged(columns=None),
        damaged(columns=strategy(6, 2).columns.tolist()),
        damaged(sha256="0" * 64),
        damaged(sha256=None),
    ],
)
def test_bad_config(config):
    with pytest.raises((TypeError, ValueError), match="Received"):
        strategies.from_config(config)


def test_a_config_of_another_matrix_must_still_be_a_strategy():
    import base64
    import hashlib

    content = np.array([[-1.0, 0.0]] * 6).tobytes()
    config = damaged(
        columns=base64.b64encode(content).decode(), sha256=hashlib.sha256(content).hexdigest()
    )
    with pytest.raises(ValueError, match="the diagonal of C, positive"):
        strategies.from_config(config)


def test_frozen_and_not_aliased():
    source = np.array([[1.0, 0.5], [1.0, 0.0]])
    s = BandedStrategy(source)
    source[0] = 7.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.columns = source
    with pytest.raises(ValueError):
        s.columns[0] = 2.0
    s.noise_rows()[:] = 0.0
    np.testing.assert_allclose(np.linalg.norm(s.columns, axis=1), 1.0)
    assert s != strategy(2, 2) and s != strategy(3, 2) and s != "BandedStrategy"


@pytest.mark.parametrize(
    "columns",
    [
        [],
        [[]],
        [1.0, 0.5],
        [[1.0], [1.0, 0.5]],
        [[0.0, 1.0], [1.0, 0.0]],
        [[1.0, 1.0], [-1.0, 0.0]],
        [[1.0, np.nan], [1.0, 0.0]],
        [[1.0, np.inf], [1.0, 0.0]],
        [[np.nan, 0.0], [1.0, 0.0]],
        [[True]],
        [["1.0"]],
        [[1j]],
        None,
    ],
)
def test_bad_columns(columns):
    with pytest.raises(ValueError, match="Expected `columns` to be.*Received"):
        BandedStrategy(columns)


def test_bad_sizes():
    with pytest.raises((TypeError, ValueError), match="num_bands=3, num_steps=2"):
        BandedStrategy(np.ones((2, 3)))
    with pytest.raises((TypeError, ValueError), match="num_bands=11, num_steps=10"):
        BandedStrategy.optimize(10, 11)
    with pytest.raises(
        (TypeError, ValueError), match="at most 100000000 entries.*`ToeplitzStrategy`"
    ):
        BandedStrategy.optimize(10**8, 2)
    with pytest.raises((TypeError, ValueError), match="num_steps=10001"):
        BandedStrategy(np.ones((10_001, 1))).materialize()
    for bad in (0, 2.0, True, None):
        with pytest.raises((TypeError, ValueError), match="Expected `num_steps` to be an integer"):
            BandedStrategy.optimize(bad, 1)
        with pytest.raises((TypeError, ValueError), match="Expected `num_bands` to be an integer"):
            BandedStrategy.optimize(10, bad)


@pytest.mark.parametrize(
    "argument",
    [
        {"error": "rms"},
        {"gain": 0.0},
        {"gain": 1},
        {"gain": float("nan")},
        {"max_iterations": 0},
        {"callback": "yes"},
        {"start": "toeplitz"},
        {"start": ToeplitzStrategy([1.0, 0.5], 11)},
        {"start": BandedStrategy(np.ones((10, 3)))},
    ],
)
def test_bad_arguments_of_optimize(argument):
    (name,) = argument
    is_type = name == "callback" or argument == {"start": "toeplitz"}
    with pytest.raises(TypeError if is_type else ValueError, match=f"`{name}`.*Received: {name}="):
        BandedStrategy.optimize(10, 2, **argument)
    with pytest.raises((TypeError, ValueError), match="Expected `error` to be"):
        strategy(5, 2).loss("rms")
