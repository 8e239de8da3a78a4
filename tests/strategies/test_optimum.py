"""Optima against the reference values of the design and of the digest's tables."""

import numpy as np
import pytest

from keras_bandmf.strategies import ToeplitzStrategy
from keras_bandmf.strategies.errors import toeplitz
from keras_bandmf.strategies.toeplitz import square_root_coefficients
from tests.strategies import reference

# RMSE of the best raw Toeplitz strategy, mean error, prefix sum: rows n, columns b.
BANDS = (1, 2, 4, 8, 16, 32, 64)
RMSE = {
    64: (5.700877, 4.201759, 3.240594, 2.663975, 2.350054, 2.211032, 2.179043),
    256: (11.335784, 8.146299, 5.978011, 4.547660, 3.637574, 3.086810, 2.783067),
    1024: (22.638463, 16.108395, 11.563292, 8.444301, 6.342793, 4.955631, 4.065913),
    4096: (45.260358, 32.081910, 22.821738, 16.355731, 11.883879, 8.825293, 6.758934),
    16384: (90.512430, 64.062866, 45.406731, 32.282498, 23.092455, 16.697889, 12.278417),
    65536: (181.020717, 128.048797, 90.628900, 64.223587, 45.628704, 32.577348, 23.454134),
    1048576: (724.077689, 512.030015, 362.112839, 256.139980, 181.256134, 128.376115, 91.077308),
}
# n, b, RMSE of the best banded strategy, and how many per cent worse raw and column-normalized
# Toeplitz strategies are.
SUBOPTIMALITY = [
    (16, 4, 1.902896, 1.820, 1.085),
    (16, 16, 1.689404, 3.612, 1.429),
    (64, 8, 2.620517, 1.658, 1.255),
    (64, 64, 2.099856, 3.771, 1.668),
    (128, 16, 2.818767, 1.908, 1.457),
    (128, 64, 2.349999, 3.343, 1.748),
    (256, 16, 3.586968, 1.411, 1.208),
    (256, 64, 2.709558, 2.713, 1.761),
    (256, 256, 2.524414, 3.646, 1.678),
    (512, 8, 6.117919, 0.542, 0.516),
    (512, 32, 3.789763, 1.582, 1.356),
    (512, 128, 2.922500, 2.728, 1.778),
    (1024, 2, 16.101149, 0.045, 0.045),
    (1024, 8, 8.414708, 0.352, 0.342),
    (1024, 16, 6.298837, 0.698, 0.665),
    (1024, 32, 4.898304, 1.170, 1.073),
    (1024, 64, 3.997715, 1.706, 1.463),
    (2048, 8, 11.685663, 0.224, 0.221),
    (2048, 16, 8.586683, 0.469, 0.457),
    (2048, 32, 6.492694, 0.838, 0.798),
    (2048, 64, 5.103662, 1.301, 1.192),
    (4096, 2, 32.076651, 0.016, 0.016),
    (4096, 8, 16.332801, 0.140, 0.139),
    (4096, 16, 11.847438, 0.308, 0.303),
    (4096, 32, 8.774243, 0.582, 0.567),
]


def raw_optimum(num_steps, num_bands, error="mean", **kwargs):
    return ToeplitzStrategy.optimize(num_steps, num_bands, error, column_normalize=False, **kwargs)


def log_loss_gradient(coefficients, num_steps, error="mean"):
    """Gradient of log(loss) by the step-by-step recurrence: nothing of the library's."""
    weights = (1.0 / num_steps, 0.0) if error == "mean" else (0.0, 1.0)
    value, gradient = reference.weighted_error(coefficients, num_steps, *weights)
    return gradient / value + 2 * coefficients / (coefficients @ coefficients)


@pytest.mark.parametrize(
    "n,b,loss",
    [(1000, 8, 69.7499295983), (10_000, 32, 175.369925740), (100_000, 32, 1605.70509817)],
)
def test_design_values_to_ten_digits(n, b, loss):
    assert raw_optimum(n, b).loss("mean") == pytest.approx(loss, rel=1e-11)


def test_square_root_start_to_ten_digits():
    s = ToeplitzStrategy(square_root_coefficients(32), 10_000, column_normalize=False)
    assert s.loss("mean") == pytest.approx(271.249758676, rel=3e-12)


@pytest.mark.parametrize("n", RMSE)
def test_table_of_optima(n):
    for b, expected in zip(BANDS, RMSE[n], strict=True):
        got = np.sqrt(raw_optimum(n, b).loss("mean"))
        assert got == pytest.approx(expected, abs=6e-7), (n, b)


def test_smallest_case():
    assert np.sqrt(raw_optimum(4, 2).loss("mean")) == pytest.approx(1.39512571, abs=6e-9)


def test_square_root_over_optimum():
    ratios = {64: 1.0035, 256: 1.0290, 1024: 1.1177, 4096: 1.2046, 16384: 1.2596, 65536: 1.2877}
    for n, ratio in ratios.items():
        start = ToeplitzStrategy(square_root_coefficients(32), n, column_normalize=False)
        assert np.sqrt(start.loss()) / RMSE[n][5] == pytest.approx(ratio, abs=6e-5)


@pytest.mark.parametrize("n,b,banded,raw,normalized", SUBOPTIMALITY)
def test_per_cent_above_the_banded_optimum(n, b, banded, raw, normalized):
    optimum = raw_optimum(n, b)
    with_norms = ToeplitzStrategy(optimum.coefficients, n)
    for s, expected in ((optimum, raw), (with_norms, normalized)):
        per_cent = 100 * (np.sqrt(s.loss("mean")) / banded - 1)
        assert per_cent == pytest.approx(expected, abs=7e-4)


@pytest.mark.parametrize(
    "n,b,expected",
    [
        (64, 4, [0.70806077, 0.47455281, 0.39774488, 0.33948282]),
        (1024, 4, [0.586320, 0.503586, 0.468519, 0.427926]),
        (
            1024,
            8,
            [0.499338, 0.386645, 0.356440, 0.338300, 0.323743, 0.309719, 0.293594, 0.269701],
        ),
        # The digest prints .91841922, which is not of norm 1: two digits swapped.
        (4, 2, [0.91842192, 0.39560230]),
    ],
)
def test_coefficients(n, b, expected):
    digits = 1e-8 if n < 1000 else 1e-6
    np.testing.assert_allclose(raw_optimum(n, b).coefficients, expected, atol=6 * digits)


@pytest.mark.parametrize(
    "n,b,rmse", [(1024, 2, 16.108395), (4096, 4, 22.821738), (16384, 8, 32.282498)]
)
def test_where_scipy_stops_silently_after_one_iteration(n, b, rmse):
    s = raw_optimum(n, b)
    assert np.sqrt(s.loss("mean")) == pytest.approx(rmse, abs=6e-7)
    assert np.max(np.abs(log_loss_gradient(s.coefficients, n))) < 2e-6


@pytest.mark.parametrize("error", ["mean", "max"])
@pytest.mark.parametrize("n,b", [(2, 2), (3, 3), (16, 16), (33, 32), (64, 4), (300, 20), (5000, 3)])
def test_gradient_vanishes_at_the_optimum(n, b, error):
    s = raw_optimum(n, b, error)
    assert np.max(np.abs(log_loss_gradient(s.coefficients, n, error))) < 3e-6
    start = ToeplitzStrategy(square_root_coefficients(b), n, column_normalize=False)
    assert s.loss(error) <= start.loss(error) * (1 + 1e-13)


def test_each_error_is_best_at_its_own_optimum():
    mean, largest = (raw_optimum(1000, 16, e) for e in ("mean", "max"))
    assert mean.loss("mean") < largest.loss("mean")
    assert largest.loss("max") < mean.loss("max")


@pytest.mark.parametrize("error", ["mean", "max"])
@pytest.mark.parametrize("n,b", [(8, 2), (64, 64), (100, 8), (1000, 32)])
def test_normalising_the_columns_is_never_worse(n, b, error):
    raw = raw_optimum(n, b, error)
    normalized = ToeplitzStrategy.optimize(n, b, error)
    np.testing.assert_array_equal(raw.coefficients, normalized.coefficients)
    assert normalized.column_normalize and normalized.loss(error) <= raw.loss(error)


@pytest.mark.parametrize("error", ["mean", "max"])
def test_a_million_steps(error):
    n = 10**6
    s = raw_optimum(n, 32, error)
    assert np.max(np.abs(log_loss_gradient(s.coefficients, n, error))) < 1e-5
    expected = 15719.897046 if error == "mean" else 31369.807021
    assert s.loss(error) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_a_million_steps_and_a_thousand_bands():
    s = raw_optimum(10**6, 1024)
    assert toeplitz.cheapest_route(10**6, 1024) == "fft"
    assert np.max(np.abs(log_loss_gradient(s.coefficients, 10**6))) < 1e-5


@pytest.mark.slow
def test_a_billion_steps():
    # Two independent limits: constant coefficients give the loss n / (2 b) as n grows, and it is
    # approached from above.
    n, b = 10**9, 64
    s = ToeplitzStrategy.optimize(n, b)
    loss = s.loss("mean")
    assert n / (2 * b) < loss < 1.0003 * n / (2 * b)
    assert loss < s.loss("max") < 1.0003 * n / b
    c = s.coefficients
    limit = n / 2 / np.sum(c) ** 2  # what is left when x has reached 1 / c(1)
    assert loss == pytest.approx(limit, rel=1e-3)


def test_progress():
    seen = []
    s = raw_optimum(1000, 8, callback=seen.append)
    values = [p.value for p in seen]
    assert len(seen) >= 3 and values == sorted(values, reverse=True)
    assert np.exp(values[-1]) == pytest.approx(s.loss("mean"), rel=1e-12)
    assert seen[-1].gradient_norm < 1e-6 < seen[0].gradient_norm
    evaluations = [p.evaluations for p in seen]
    assert evaluations == sorted(evaluations)


def test_search_is_deterministic():
    first, second = raw_optimum(500, 8), raw_optimum(500, 8)
    assert first == second
