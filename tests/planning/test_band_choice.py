"""The choice of bands: against an exhaustive search, reference values, and its caps."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from keras_bandmf.accounting.accountant import calibrate_noise
from keras_bandmf.noise import CorrelatedNoise
from keras_bandmf.planning.band_choice import choose_bands, expected_rmse, max_bands_for_memory
from keras_bandmf.strategies import ToeplitzStrategy
from tests.plans import make_schedule


@dataclasses.dataclass
class FakeStrategy:
    """Mean error ((n + 1) / 2) / b: close to the Toeplitz optimum for n >> b^2."""

    num_steps: int
    num_bands: int

    def loss(self, error):
        assert error == "mean"
        return (self.num_steps + 1) / 2 / self.num_bands


schedule = functools.partial(
    make_schedule, num_examples=10_000, batch_size=100, num_steps=400, num_bands=1
)


def fake(run):
    return lambda bands: FakeStrategy(run.num_steps, bands)


def test_expected_rmse_by_dense_matrices():
    n, sigma = 40, 1.3
    c = np.array([0.8, 0.5, 0.3])
    c /= np.linalg.norm(c)
    matrix = sum(np.diag(np.full(n - k, c[k]), -k) for k in range(3))
    error = np.sum((np.tril(np.ones((n, n))) @ np.linalg.inv(matrix)) ** 2, axis=1).mean()
    run = schedule(num_steps=n, num_bands=3)
    participations = n * 100 / 10_000
    expected = sigma * math.sqrt(error) / participations
    assert expected_rmse(run, sigma, error) == pytest.approx(expected, rel=1e-12)
    fixed = schedule(num_steps=300, num_bands=3, sampling="fixed_order")  # 3 epochs
    expected = sigma * math.sqrt(3) * math.sqrt(error) / 3
    assert expected_rmse(fixed, sigma, error) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "num_steps"), [(0.7, 400), (4.0, 400), (2.0, 100)])
def test_auto_is_close_to_the_exhaustive_best(epsilon, num_steps):
    run = schedule(num_steps=num_steps)
    choice = choose_bands(run, epsilon, 1e-6, fake(run))
    best, guess = math.inf, None
    for bands in range(1, 101):
        if bands > 12 and bands % 5:
            continue
        candidate = schedule(num_steps=num_steps, num_bands=bands)
        guess = calibrate_noise(candidate, epsilon, 1e-6, accuracy=1e-2, guess=guess)
        best = min(best, expected_rmse(candidate, guess, fake(run)(bands).loss("mean")))
    assert choice.best.expected_rmse <= 1.03 * best
    assert choice.best.expected_rmse <= choice.dp_sgd.expected_rmse
    assert choice.dp_sgd.num_bands == 1


def test_more_budget_takes_more_bands():
    run = schedule()

    def square_root(bands):
        steps = np.arange(1, bands)
        return ToeplitzStrategy(np.cumprod(np.r_[1.0, 1 - 1 / (2 * steps)]), run.num_steps)

    low, high = (choose_bands(run, epsilon, 1e-6, square_root).best for epsilon in (0.5, 8.0))
    assert low.num_bands < high.num_bands


@pytest.mark.parametrize(
    ("changes", "max_bands", "most"),
    [
        ({"num_examples": 350}, 128, 3),  # q = b batch / N <= 1
        ({"sampling": "fixed_order"}, 128, 100),  # b <= steps of an epoch
        ({"sampling": "fixed_order"}, 10, 10),
        (
            {"sampling": "fixed_order", "max_participations": 2, "min_separation": 7},
            128,
            7,
        ),
        ({"num_steps": 5}, 128, 5),
        ({}, 1, 1),
    ],
)
def test_caps(changes, max_bands, most):
    run = schedule(**changes)
    choice = choose_bands(run, 8.0, 1e-6, fake(run), max_bands=max_bands)
    assert max(c.num_bands for c in choice.candidates) == most
    if run.sampling == "fixed_order":  # every band helps, none costs noise
        assert choice.best.num_bands == most
        assert len({c.noise_multiplier for c in choice.candidates}) == 1


def test_no_candidate_pays_for_a_round_it_barely_uses():
    run = schedule(num_steps=100, num_examples=100_000)
    for candidate in choose_bands(run, 4.0, 1e-6, fake(run)).candidates:
        bands = candidate.num_bands
        assert bands == 1 or math.ceil(100 / (bands - 1)) > math.ceil(100 / bands)


def test_a_given_number_is_compared_with_dp_sgd():
    run = schedule(num_steps=60)
    make = lambda bands: ToeplitzStrategy.optimize(60, bands)  # noqa: E731
    choice = choose_bands(run, 2.0, 1e-6, make, num_bands=4)
    assert [c.num_bands for c in choice.candidates] == [1, 4]
    dp_sgd = choice.dp_sgd
    exact = dp_sgd.noise_multiplier * math.sqrt(61 / 2) / 0.6
    assert dp_sgd.expected_rmse == pytest.approx(exact, rel=1e-9)
    table = str(choice).splitlines()
    assert len(table) == 3
    assert [line.startswith("*") for line in table].count(True) == 1


def test_bad_arguments():
    run = schedule()
    with pytest.raises(ValueError, match="epsilon"):
        choose_bands(run, -1.0, 1e-6, fake(run))
    with pytest.raises(ValueError, match="max_bands"):
        choose_bands(run, 1.0, 1e-6, fake(run), max_bands=0)
    with pytest.raises(ValueError, match="Use at most 100 bands"):
        choose_bands(run, 1.0, 1e-6, fake(run), num_bands=101)


@pytest.mark.parametrize(
    ("epochs", "epsilon", "bands", "best", "gain"),
    [
        # n = 4096, delta = 1e-6, raw Toeplitz, powers of two; sigma by dp_accounting's PLD on a
        # grid of 1e-4 (on one of 1e-3, which overstates DP-SGD's epsilon by 0.6 %, 1.132, 1.034).
        (16, 1.0, (4, 8, 16), 8, 1.1276),
        pytest.param(32, 1.0, (2, 4, 8), 4, 1.030, marks=pytest.mark.slow),
        pytest.param(16, 8.0, (32, 64, 128), 64, None, marks=pytest.mark.slow),
    ],
)
def test_reference_bands(epochs, epsilon, bands, best, gain):
    run = schedule(num_steps=4_096, batch_size=100, num_examples=100 * 4_096 // epochs)

    def raw(bands):
        return ToeplitzStrategy.optimize(4_096, bands, column_normalize=False)

    choice = choose_bands(run, epsilon, 1e-6, raw, num_bands=bands)
    assert [row.num_bands for row in choice.candidates] == [1, *bands]
    assert choice.best.num_bands == best
    if gain is not None:
        ratio = choice.dp_sgd.expected_rmse / choice.best.expected_rmse
        assert ratio == pytest.approx(gain, abs=1.5e-3)


@pytest.mark.parametrize("parameters", [1, 1_000_000, 5_000_001])
def test_max_bands_is_what_fits(parameters):
    class Bands:
        num_steps = 10**6

        def __init__(self, num_bands):
            self.num_bands = num_bands

        def noise_rows(self):
            return np.ones((1, self.num_bands))

        def tail_scale(self):
            return np.zeros(0)

    for memory in (2**26, 3 * 2**24 + 12_345):
        most = max_bands_for_memory(parameters, memory)
        fits, exceeds = (
            CorrelatedNoise(Bands(bands), 1.0, [(parameters,)], seed=1).state_bytes
            for bands in (most, most + 1)
        )
        assert fits <= memory < exceeds
    assert max_bands_for_memory(parameters, 0) == 1


def test_max_bands_grows_with_replicas():
    assert max_bands_for_memory(2**24, 2**26) == 2
    assert max_bands_for_memory(2**24, 2**26, num_replicas=4) == 5
    for arguments in ((0, 1), (1, -1), (1, 1, 0)):
        with pytest.raises(ValueError, match="Received"):
            max_bands_for_memory(*arguments)
    with pytest.raises(TypeError, match="memory_bytes=1.0"):
        max_bands_for_memory(1, 1.0)
