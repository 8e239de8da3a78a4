"""ToeplitzStrategy: its matrix, its errors, its noise, its JSON, bad input."""

import dataclasses
import json

import numpy as np
import pytest

from keras_bandmf import strategies
from keras_bandmf.strategies import ToeplitzStrategy
from keras_bandmf.strategies.errors import toeplitz
from keras_bandmf.strategies.toeplitz import square_root_coefficients
from tests.strategies import reference

SIZES = [(1, 1), (2, 1), (2, 2), (5, 5), (7, 2), (60, 59), (100, 8), (100, 100), (300, 32)]


def strategy(num_steps, num_bands, normalize=True, seed=0):
    noise = np.random.default_rng(seed).standard_normal(num_bands)
    vector = 3.0 * (square_root_coefficients(num_bands) + 0.03 * noise)
    return ToeplitzStrategy(vector, num_steps, normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n,b", SIZES)
def test_matrix_is_banded_lower_triangular_and_of_column_norm_one(n, b, normalize):
    s = strategy(n, b, normalize)
    matrix = s.materialize()
    np.testing.assert_allclose(
        matrix, reference.dense_strategy(s.coefficients, n, normalize), rtol=1e-14
    )
    lag = np.subtract.outer(np.arange(n), np.arange(n))
    assert np.all(matrix[(lag < 0) | (lag >= b)] == 0.0)
    norms = np.linalg.norm(matrix, axis=0)
    np.testing.assert_allclose(np.max(norms), 1.0, rtol=1e-14)
    if normalize:
        np.testing.assert_allclose(norms, 1.0, rtol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n,b", SIZES)
def test_noise_rows_and_tail_scale_are_the_inverse_of_the_matrix(n, b, normalize):
    s = strategy(n, b, normalize)
    (row,) = s.noise_rows()
    assert row.shape == (b,) and row.dtype == np.float64
    released = np.zeros((n, n))  # released[i] = row i of C^-1 Z for Z = I
    noise = np.eye(n)
    for i in range(n):
        past = sum(row[k] * released[i - k] for k in range(1, min(i, b - 1) + 1))
        released[i] = (noise[i] - past) / row[0]
    scale = s.tail_scale()
    assert scale.shape == ((b - 1) if normalize else 0,) and scale.dtype == np.float64
    released[n - len(scale) :] *= scale[:, None]
    np.testing.assert_allclose(s.materialize() @ released, np.eye(n), atol=1e-11)


@pytest.mark.parametrize("route", [None, "doubling"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n,b", SIZES)
def test_errors_are_those_of_the_dense_matrix(n, b, normalize, route, monkeypatch):
    if route:
        monkeypatch.setattr(toeplitz, "cheapest_route", lambda *_: route)
    s = strategy(n, b, normalize)
    expected = reference.dense_errors(s.materialize())
    np.testing.assert_allclose(s.per_step_error(), expected, rtol=1e-11)
    np.testing.assert_allclose(s.loss("mean"), np.mean(expected), rtol=1e-11)
    np.testing.assert_allclose(s.loss("max"), np.max(expected), rtol=1e-11)


def test_loss_of_the_two_ways_agrees_at_a_million_steps(monkeypatch):
    s = ToeplitzStrategy(square_root_coefficients(32), 10**6)
    errors = s.per_step_error()
    monkeypatch.setattr(toeplitz, "cheapest_route", lambda *_: "doubling")
    np.testing.assert_allclose(s.loss("mean"), np.mean(errors), rtol=1e-11)
    np.testing.assert_allclose(s.loss("max"), np.max(errors), rtol=1e-11)


def test_many_bands_take_the_transform_for_each_step():
    s = strategy(2000, 700)
    expected = reference.dense_errors(s.materialize())
    np.testing.assert_allclose(s.per_step_error(), expected, rtol=1e-10)


def test_one_band_is_the_identity():
    s = ToeplitzStrategy.optimize(1000, 1)
    np.testing.assert_array_equal(s.materialize(), np.eye(1000))
    np.testing.assert_array_equal(s.per_step_error(), np.arange(1.0, 1001.0))
    assert (s.loss("mean"), s.loss("max")) == (500.5, 1000.0)
    assert s.tail_scale().size == 0 and s.sensitivity(10, 1) == pytest.approx(np.sqrt(10))
    assert ToeplitzStrategy.optimize(10**12, 1).loss() == (10**12 + 1) / 2


def test_overflow_reads_as_infinity():
    s = ToeplitzStrategy([1.0, -3.0], 10_000)
    assert s.loss("mean") == s.loss("max") == np.inf
    errors = s.per_step_error()
    assert np.isfinite(errors[100]) and errors[-1] == np.inf and not np.any(np.isnan(errors))


def test_coefficients_are_scaled_to_norm_one():
    for vector in ([3.0, 4.0], [3e-300, 4e-300], [3e300, 4e300], np.array([3, 4], np.int32)):
        s = ToeplitzStrategy(vector, 5)
        assert s.coefficients.dtype == np.float64
        np.testing.assert_allclose(s.coefficients, [0.6, 0.8], rtol=1e-15)


def test_negative_later_coefficients_are_a_valid_strategy():
    s = ToeplitzStrategy([1.0, -0.5], 10)
    np.testing.assert_allclose(
        s.per_step_error(), reference.dense_errors(s.materialize()), rtol=1e-12
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("b", [1, 2, 3, 7, 32, 100])
def test_json_is_exact(b, normalize):
    for seed in range(20):
        s = strategy(1000, b, normalize, seed)
        back = strategies.from_config(json.loads(json.dumps(s.get_config())))
        assert back == s and hash(back) == hash(s) and type(back) is ToeplitzStrategy
        assert back.coefficients.tobytes() == s.coefficients.tobytes()


def test_json_is_exact_where_no_coefficient_exceeds_a_half():
    """Scaled by its largest entry first, such a column came back with other last bits."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        s = ToeplitzStrategy(1.0 + 0.1 * rng.random(7), 20)
        assert s.coefficients.max() < 0.5
        back = ToeplitzStrategy.from_config(json.loads(json.dumps(s.get_config())))
        assert back.coefficients.tobytes() == s.coefficients.tobytes()


def test_equality_sees_every_field():
    s = strategy(10, 3)
    assert s != strategy(11, 3) and s != strategy(10, 3, False) and s != strategy(10, 3, seed=1)
    assert s != "ToeplitzStrategy"


def test_frozen_and_not_aliased():
    source = np.array([1.0, 0.5])
    s = ToeplitzStrategy(source, 5)
    source[0] = 7.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.num_steps = 6
    with pytest.raises(ValueError):
        s.coefficients[0] = 2.0
    s.noise_rows()[:] = 0.0
    np.testing.assert_allclose(np.linalg.norm(s.coefficients), 1.0)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"class_name": "BufferedToeplitz"},
        {"class_name": "ToeplitzStrategy"},
        {"class_name": "ToeplitzStrategy", "num_steps": 3, "coefficients": [1.0]},
        {**strategy(3, 2).get_config(), "extra": 1},
        {**strategy(3, 2).get_config(), "num_steps": 3.0},
        {**strategy(3, 2).get_config(), "coefficients": None},
    ],
)
def test_bad_config(config):
    with pytest.raises((TypeError, ValueError), match="Received"):
        strategies.from_config(config)


@pytest.mark.parametrize(
    "vector",
    [
        [],
        [[1.0, 0.5]],
        [[1.0], [1.0, 0.5]],
        [0.0, 1.0],
        [-1.0, 0.5],
        [1.0, np.nan],
        [1.0, np.inf],
        [True, False],
        ["1.0"],
        [1j],
        1.0,
        None,
    ],
)
def test_bad_coefficients(vector):
    with pytest.raises(ValueError, match="`coefficients`.*Received: coefficients="):
        ToeplitzStrategy(vector, 5)


@pytest.mark.parametrize("bad", [0, -3, 2.0, True, "8", None, np.float64(4)])
def test_bad_counts(bad):
    with pytest.raises(
        (TypeError, ValueError), match="Expected `num_steps` to be an integer.*Received: num_steps="
    ):
        ToeplitzStrategy([1.0], bad)
    with pytest.raises((TypeError, ValueError), match="Expected `num_steps` to be an integer"):
        ToeplitzStrategy.optimize(bad, 1)
    with pytest.raises(
        (TypeError, ValueError), match="Expected `num_bands` to be an integer.*Received: num_bands="
    ):
        ToeplitzStrategy.optimize(10, bad)


def test_numpy_integers_are_integers():
    s = ToeplitzStrategy.optimize(np.int64(10), np.int32(2))
    assert type(s.num_steps) is int and s.num_bands == 2


def test_numpy_bools_are_bools():
    strategy = ToeplitzStrategy([1.0, 0.5], 8, column_normalize=np.True_)
    assert strategy.column_normalize is True
    found = strategies.from_config(json.loads(json.dumps(strategy.get_config())))
    assert found == strategy
    workload = strategies.Workload(8, momentum=0.9, nesterov=np.True_)
    assert workload.nesterov is True


def test_more_bands_than_steps():
    with pytest.raises(ValueError, match="num_bands=11, num_steps=10"):
        ToeplitzStrategy.optimize(10, 11)
    with pytest.raises(ValueError, match="num_bands=3, num_steps=2"):
        ToeplitzStrategy([1.0, 0.5, 0.2], 2)


def test_too_many_steps():
    with pytest.raises(ValueError, match="at most 1000000000000"):
        ToeplitzStrategy([1.0], 10**12 + 1)
    long = ToeplitzStrategy([1.0, 0.5], 10**8 + 1)
    with pytest.raises(ValueError, match=r"num_steps=100000001.*`loss\(\)`"):
        long.per_step_error()
    assert np.isfinite(long.loss("mean"))
    with pytest.raises(ValueError, match="num_steps=10001.*noise_rows"):
        ToeplitzStrategy([1.0, 0.5], 10_001).materialize()


@pytest.mark.parametrize("bad", ["rms", "MEAN", None, 1])
def test_unknown_error(bad):
    with pytest.raises(
        (TypeError, ValueError), match="Expected `error` to be one of 'mean', 'max'. Received"
    ):
        ToeplitzStrategy.optimize(10, 2, error=bad)
    with pytest.raises(
        (TypeError, ValueError), match="Expected `error` to be one of 'mean', 'max'. Received"
    ):
        ToeplitzStrategy([1.0, 0.5], 10).loss(bad)


@pytest.mark.parametrize("bad", [0, 1, None, "yes"])
def test_bad_flag_and_callback(bad):
    with pytest.raises(
        (TypeError, ValueError), match="Expected `column_normalize` to be True or False"
    ):
        ToeplitzStrategy.optimize(10, 2, column_normalize=bad)
    with pytest.raises(
        (TypeError, ValueError), match="Expected `column_normalize` to be True or False"
    ):
        ToeplitzStrategy([1.0], 10, column_normalize=bad)
    if bad is not None:
        with pytest.raises((TypeError, ValueError), match="Expected `callback` to be a function"):
            ToeplitzStrategy.optimize(10, 2, callback=bad)
