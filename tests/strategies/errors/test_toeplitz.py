"""The three routes against dense NumPy, the step-by-step recurrence and each other."""

import numpy as np
import pytest

from keras_bandmf.strategies.errors import toeplitz
from keras_bandmf.strategies.toeplitz import square_root_coefficients
from tests.strategies import reference

SIZES = [(2, 2), (3, 3), (5, 5), (7, 2), (8, 3), (33, 32), (64, 64), (100, 8), (257, 16), (500, 2)]
WEIGHTS = {"mean": lambda n: (1.0 / n, 0.0), "max": lambda n: (0.0, 1.0)}


def coefficients_near_square_root(num_bands, seed=0):
    """Coefficients that are neither normalized nor monotone."""
    noise = np.random.default_rng(seed).standard_normal(num_bands)
    return 1.7 * (square_root_coefficients(num_bands) + 0.02 * noise)


def evaluate(coefficients, num_steps, error, route):
    value, gradient = toeplitz.weighted_error(
        coefficients, num_steps, *WEIGHTS[error](num_steps), route
    )
    return float(value), gradient.numpy()


@pytest.mark.parametrize("error", ["mean", "max"])
@pytest.mark.parametrize("route", toeplitz.ROUTES)
@pytest.mark.parametrize("n,b", SIZES)
def test_value_and_gradient_are_those_of_the_dense_matrix(n, b, route, error):
    c = coefficients_near_square_root(b)
    inverse = np.linalg.inv(reference.dense_strategy(c, n, False))
    product = np.tril(np.ones((n, n))) @ inverse
    row_weight = np.full(n, 1.0 / n) if error == "mean" else np.eye(n)[-1]
    expected = row_weight @ np.sum(product**2, axis=1)
    # d(A C^-1) = -(A C^-1) dC C^-1, with dC the k-th subdiagonal.
    outer = product.T @ (row_weight[:, None] * product) @ inverse.T
    expected_gradient = [-2.0 * np.trace(outer, -k) for k in range(b)]
    value, gradient = evaluate(c, n, error, route)
    np.testing.assert_allclose(value, expected, rtol=1e-11)
    np.testing.assert_allclose(
        gradient, expected_gradient, rtol=0, atol=1e-10 * np.max(np.abs(expected_gradient))
    )


@pytest.mark.parametrize("route", toeplitz.ROUTES)
def test_gradient_is_that_of_finite_differences(route):
    n, b, step = 1000, 8, 1e-6
    c = coefficients_near_square_root(b)
    _, gradient = evaluate(c, n, "mean", route)
    for k in range(b):
        up, down = c.copy(), c.copy()
        up[k] += step
        down[k] -= step
        slope = evaluate(up, n, "mean", route)[0] - evaluate(down, n, "mean", route)[0]
        np.testing.assert_allclose(gradient[k], slope / (2 * step), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("error", ["mean", "max"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 1000, 1023, 1024, 1025])
def test_doubling_any_binary_pattern_of_steps(n, error):
    # n may be below b here: column normalization asks for the first n - b + 1 steps.
    c = coefficients_near_square_root(6)
    x = reference.filtered_sums(c, n)
    weights = WEIGHTS[error](n)
    doubled = toeplitz.doubling(c, toeplitz.step_bits(n), *weights)
    expected = (weights[0] * (n - np.arange(n)) + weights[1]) @ x**2
    np.testing.assert_allclose(float(doubled.error), expected, rtol=1e-11)
    np.testing.assert_allclose(float(doubled.summed), (n - np.arange(n)) @ x**2, rtol=1e-11)
    np.testing.assert_allclose(float(doubled.last), x @ x, rtol=1e-11)


def test_doubling_state_and_covariance():
    n, b = 43, 6
    c = coefficients_near_square_root(b)
    x = np.concatenate([np.zeros(b), reference.filtered_sums(c, n + 1)])
    h = np.diff(x, prepend=0.0)
    states = np.array([[x[t], *h[t : t - b + 1 : -1]] for t in range(b, b + n + 1)])
    doubled = toeplitz.doubling(c, toeplitz.step_bits(n), 0.0, 1.0)
    np.testing.assert_allclose(doubled.state.numpy(), states[n], rtol=1e-11, atol=1e-13)
    expected = states[:n, 0] @ states[:n]
    np.testing.assert_allclose(doubled.covariance.numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("route", ["scan", "fft"])
@pytest.mark.parametrize("n,b", [*SIZES, (4097, 40)])
def test_impulse_response(n, b, route):
    c = coefficients_near_square_root(b)
    expected = np.diff(reference.filtered_sums(c, n), prepend=0.0)
    response = toeplitz.impulse_response(c, n, route).numpy()
    np.testing.assert_allclose(response, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("error", ["mean", "max"])
@pytest.mark.parametrize("n,b", [(10**6, 32), pytest.param(10**6, 1024, marks=pytest.mark.slow)])
def test_routes_agree_at_a_million_steps(n, b, error):
    c = square_root_coefficients(b)
    expected, expected_gradient = reference.weighted_error(c, n, *WEIGHTS[error](n))
    for route in toeplitz.ROUTES if b < 1000 else ("scan", "fft"):
        value, gradient = evaluate(c, n, error, route)
        np.testing.assert_allclose(value, expected, rtol=1e-11, err_msg=route)
        scale = np.max(np.abs(expected_gradient))
        np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-10 * scale)


def test_a_billion_steps_two_bands_in_closed_form():
    n, r = 10**9, 0.998
    q = -r
    # x_i = (1 - q^(i+1)) / (1 + r), and sum_{i<n} (n - i) p^i has a closed form.
    weighted_powers = lambda p: (n - p * (1 - p**n) / (1 - p)) / (1 - p)  # noqa: E731
    total = n * (n + 1) / 2 - 2 * q * weighted_powers(q) + q * q * weighted_powers(q * q)
    value, _ = evaluate(np.array([1.0, r]), n, "mean", "doubling")
    np.testing.assert_allclose(value, total / (1 + r) ** 2 / n, rtol=1e-13)


def test_a_billion_steps_sixty_four_bands_by_the_limit():
    # After a million steps x has reached its limit 1 / c(1) to rounding.
    n, head = 10**9, 10**6
    c = square_root_coefficients(64)
    x = reference.filtered_sums(c, head)
    limit = 1.0 / np.sum(c)
    np.testing.assert_allclose(x[-1], limit, rtol=1e-12)
    rest = (n - head) * (n - head + 1) / 2 * limit**2
    expected = ((n - np.arange(head)) @ x**2 + rest) / n
    value, _ = evaluate(c, n, "mean", "doubling")
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_overflow_is_not_finite_and_not_an_error():
    for route in toeplitz.ROUTES:
        value, _ = evaluate(np.array([1.0, -3.0]), 10_000, "mean", route)
        assert not np.isfinite(value)


@pytest.mark.parametrize(
    "n,b,route",
    [(64, 4, "scan"), (10**6, 32, "doubling"), (10**6, 1024, "fft"), (10**9, 1024, "doubling")],
)
def test_cheapest_route(n, b, route):
    assert toeplitz.cheapest_route(n, b) == route


def test_one_trace_serves_every_size():
    # Tracing is most of the first second: it must not come back for another n or b. Only what is
    # traced here counts: another test of this process may have called the same functions under
    # another device, which is a trace of its own.
    functions = (toeplitz.doubling, toeplitz._scan_error, toeplitz._fft_error)
    traced = []
    for n, b in [(10, 2), (50, 7), (300, 30)]:
        for route in toeplitz.ROUTES:
            evaluate(square_root_coefficients(b), n, "mean", route)
        traced.append([function.experimental_get_tracing_count() for function in functions])
    assert traced[0] == traced[1] == traced[2]
