"""Accounting: reference values, independent formulas, partial runs, the safe side, bad input."""

import math

import dp_accounting
import mpmath
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_bandmf.accounting import accountant
from keras_bandmf.accounting.accountant import FINITE_NOISE_SHARE, calibrate_noise, epsilon_of
from tests.plans import make_schedule as schedule


def gaussian_epsilon(sigma, delta):
    """The analytic Gaussian mechanism (Balle and Wang 2018, theorem 8), solved for epsilon.

    At the part of delta that the accounting uses.
    """
    delta = delta * (1 - FINITE_NOISE_SHARE)

    def excess(epsilon):
        a, b = 1 / (2 * sigma), epsilon * sigma
        second = math.exp(epsilon + scipy.stats.norm.logcdf(-a - b))
        return scipy.stats.norm.cdf(a - b) - second - delta

    return scipy.optimize.brentq(excess, 0.0, 1000.0, xtol=1e-12)


def mpmath_gaussian_epsilon(sigma, delta):
    """The same in 90 digits, for the smallest delta."""
    with mpmath.workdps(90):
        share = mpmath.mpf(delta) * (1 - mpmath.mpf(FINITE_NOISE_SHARE))

        def log_excess(epsilon):
            first = mpmath.ncdf(1 / (2 * mpmath.mpf(sigma)) - epsilon * sigma)
            second = mpmath.ncdf(-1 / (2 * mpmath.mpf(sigma)) - epsilon * sigma)
            return mpmath.log(first - mpmath.exp(epsilon) * second) - mpmath.log(share)

        return float(mpmath.findroot(log_excess, (0.1, 40), solver="anderson", tol=1e-40))


def rounds_of(q, sigma, rounds):
    sampled = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    return dp_accounting.SelfComposedDpEvent(sampled, rounds)


# By dp_accounting's PLD accountant at a grid of 1e-4, for the whole of delta = 1e-5.
@pytest.mark.parametrize(("bands", "sigma"), [(1, 0.95910), (4, 1.52876)])
def test_reference_noise_multipliers(bands, sigma):
    run = schedule(num_bands=bands)
    found = calibrate_noise(run, 2.0, 1e-5)
    assert sigma < found < sigma * (1 + 1e-4)  # the reserve of delta costs less than that
    assert calibrate_noise(run, 2.0, 1e-5 / (1 - FINITE_NOISE_SHARE)) == pytest.approx(
        sigma, rel=1e-5
    )
    assert epsilon_of(run.dp_event(found), 1e-5) <= 2.0
    assert epsilon_of(run.dp_event(found * (1 - 3e-6)), 1e-5) > 2.0  # and no more than that


@pytest.mark.parametrize(
    ("epsilon", "delta", "sigma"),
    [
        (1.0, 1e-5, 3.73063),
        (1.0, 1e-6, 4.22468),
        (1.0, 1e-8, 5.10031),
        (8.0, 1e-5, 0.60023),
        (8.0, 1e-6, 0.65294),
        (8.0, 1e-8, 0.74839),
        (2.0, 1e-6, 2.23048),
        (0.5, 1e-8, 9.86353),
    ],
)
def test_fixed_order_is_one_gaussian(epsilon, delta, sigma):
    run = schedule(sampling="fixed_order")
    found = calibrate_noise(run, epsilon, delta)
    assert sigma < found < sigma * (1 + 1e-4)  # the reserve of delta costs less than that
    assert gaussian_epsilon(found, delta) <= epsilon
    whole = calibrate_noise(run, epsilon, delta / (1 - FINITE_NOISE_SHARE))
    assert whole == pytest.approx(sigma, abs=6e-6)


def test_the_noise_has_its_share_of_delta():
    run = schedule(sampling="fixed_order")
    with_share = epsilon_of(run.dp_event(1.5), 1e-6)
    exact = gaussian_epsilon(1.5, 1e-6)
    assert with_share == pytest.approx(exact, rel=1e-9)
    assert with_share > gaussian_epsilon(1.5, 1e-6 / (1 - FINITE_NOISE_SHARE)) * (1 + 1e-5)
    sampled = schedule(num_bands=4)
    grown = epsilon_of(sampled.dp_event(1.5), 1e-6 / (1 - FINITE_NOISE_SHARE))
    assert epsilon_of(sampled.dp_event(1.5), 1e-6) > grown * (1 + 1e-5)


def test_amplified_event():
    event = schedule(num_steps=1001, num_bands=4).dp_event(1.5)
    assert event == rounds_of(4 * 600 / 60_000, 1.5, 251)
    assert schedule().sensitivity == 1.0
    assert schedule().adjacency == "add-or-remove-one"


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 997, 1000])
def test_partial_amplified_run_charges_whole_rounds(steps):
    assert schedule().dp_event(1.5, steps) == rounds_of(0.04, 1.5, math.ceil(steps / 4))


def test_fixed_order_sensitivity_and_partial_runs():
    run = schedule(sampling="fixed_order", num_steps=950)  # 100 steps an epoch
    assert run.participations() == 10
    assert run.sensitivity == math.sqrt(10)
    assert run.adjacency == "zero-out"
    assert run.dp_event(1.5) == dp_accounting.GaussianDpEvent(1.5)
    for steps, so_far in ((1, 1), (100, 1), (101, 2), (850, 9), (901, 10)):
        sigma = run.dp_event(1.5, steps).noise_multiplier
        # z has standard deviation sigma sqrt(10); so_far participations weigh sqrt(so_far).
        assert sigma == pytest.approx(1.5 * math.sqrt(10 / so_far), rel=1e-15)
        exact = gaussian_epsilon(sigma, 1e-6)
        assert exact <= epsilon_of(run.dp_event(1.5, steps), 1e-6) <= exact + 1e-4


def test_declared_participations():
    run = schedule(sampling="fixed_order", num_steps=1000, max_participations=3, min_separation=50)
    assert (run.participations(), run.participations(60), run.separation) == (3, 2, 50)
    with pytest.raises(ValueError, match="at most 50 bands"):
        schedule(sampling="fixed_order", num_bands=51, max_participations=3, min_separation=50)
    with pytest.raises(ValueError, match="10 times"):
        run.check_own_batches()
    schedule(sampling="fixed_order", max_participations=10, min_separation=90).check_own_batches()


def test_sampling_everything_is_no_amplification():
    run = schedule(num_examples=6_000, num_steps=100, num_bands=10)
    assert run.sampling_probability == 1.0
    exact = gaussian_epsilon(5.0 / math.sqrt(10), 1e-6)
    assert exact <= epsilon_of(run.dp_event(5.0), 1e-6) <= exact + 1e-3


@pytest.mark.parametrize("delta", [1e-6, 1e-9, 1e-12, 1e-20, 1e-60])
def test_tiny_delta_stays_on_the_safe_side(delta):
    # Sampling nearly always: no less than the same with one example in 10^6 left out for certain.
    exact = mpmath_gaussian_epsilon(1.0, delta)
    found = epsilon_of(rounds_of(1.0 - 1e-9, 100.0, 10_000), delta)
    assert exact * (1 - 1e-6) <= found <= exact * (1 + 1e-4)
    assert exact <= epsilon_of(rounds_of(1.0, 100.0, 10_000), delta) <= exact * (1 + 1e-9)


def test_without_noise_epsilon_is_infinite():
    assert epsilon_of(schedule().dp_event(0.0), 1e-5) == math.inf
    assert epsilon_of(schedule(sampling="fixed_order").dp_event(0.0), 1e-5) == math.inf
    assert epsilon_of(schedule().dp_event(1e-9), 1e-5) == math.inf
    nothing = schedule().dp_event(0.0, steps=0)
    assert epsilon_of(nothing, 1e-5) == 0.0
    assert accountant.accountant_name(nothing) == "PLD"
    assert accountant.accountant_name(schedule().dp_event(1.0)) == "PLD"
    fixed = schedule(sampling="fixed_order").dp_event(1.0)
    assert accountant.accountant_name(fixed) == "analytic Gaussian"


def test_hardly_any_noise_gives_a_large_finite_bound():
    run = schedule(sampling="fixed_order", num_steps=100)
    epsilons = [epsilon_of(run.dp_event(sigma), 1e-5) for sigma in (1e-4, 1e-3, 1e-2, 0.1)]
    assert all(np.isfinite(epsilons))
    assert np.isfinite(epsilon_of(schedule().dp_event(1e-4), 1e-5))
    assert epsilons == sorted(epsilons, reverse=True)
    # rho-zCDP's bound, with rho = 1 / (2 sigma^2), from the side of the Gaussian's tail.
    assert epsilons[2] >= 1 / (2 * 0.01**2)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 60.0, 3000.0])
def test_calibration_at_extremes(epsilon):
    run = schedule(num_steps=40, num_examples=6_000)
    sigma = calibrate_noise(run, epsilon, 1e-6)
    assert 0.9 * epsilon < epsilon_of(run.dp_event(sigma), 1e-6) <= epsilon


def test_calibration_from_a_bad_guess():
    run = schedule(num_steps=40)
    expected = calibrate_noise(run, 1.0, 1e-6, accuracy=1e-3)
    for guess in (expected / 3, expected * 3):
        found = calibrate_noise(run, 1.0, 1e-6, accuracy=1e-3, guess=guess)
        assert found == pytest.approx(expected, rel=2e-4)
        assert epsilon_of(run.dp_event(found), 1e-6, 1e-3) <= 1.0


RUNS = st.builds(
    schedule,
    sampling=st.sampled_from(["cyclic_poisson", "fixed_order"]),
    num_examples=st.integers(2_000, 10**6),
    batch_size=st.integers(1, 100),
    num_steps=st.integers(20, 5_000),
    num_bands=st.integers(1, 20),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(RUNS, st.floats(0.4, 50.0), st.floats(1.01, 2.0), st.sampled_from([1e-5, 1e-9, 1e-13]))
def test_epsilon_falls_with_noise(run, sigma, factor, delta):
    less = epsilon_of(run.dp_event(sigma), delta, 1e-3)
    more = epsilon_of(run.dp_event(sigma * factor), delta, 1e-3)
    assert more <= less * (1 + 1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(RUNS, st.floats(0.4, 50.0), st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4))
def test_epsilon_grows_with_steps(run, sigma, shares):
    steps = sorted(round(share * run.num_steps) for share in shares)
    epsilons = [epsilon_of(run.dp_event(sigma, t), 1e-6, 1e-3) for t in [0, *steps]]
    epsilons.append(epsilon_of(run.dp_event(sigma), 1e-6, 1e-3))
    for before, after in zip(epsilons, epsilons[1:], strict=False):
        assert before <= after * (1 + 1e-6)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(RUNS, st.floats(0.5, 8.0), st.sampled_from([1e-5, 1e-8]))
def test_calibration_is_never_above_the_target(run, epsilon, delta):
    sigma = calibrate_noise(run, epsilon, delta, accuracy=1e-3)
    assert epsilon_of(run.dp_event(sigma), delta, 1e-3) <= epsilon


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": "shuffled"}, "Expected `sampling`"),
        ({"num_bands": 101}, "Use at most 100 bands"),  # q > 1
        ({"num_bands": 101, "sampling": "fixed_order"}, "Use at most 100 bands"),
        ({"num_bands": 0}, "num_bands=0"),
        ({"num_bands": 20, "num_steps": 10}, "Use fewer bands"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"batch_size": 60_001}, "batch_size=60001"),
        ({"num_examples": -1}, "num_examples=-1"),
        ({"max_participations": 3, "min_separation": 5}, "fixed order"),
        ({"sampling": "fixed_order", "max_participations": 3}, "together"),
        (
            {"sampling": "fixed_order", "max_participations": 0, "min_separation": 9},
            "max_participations=0",
        ),
    ],
)
def test_schedules_that_cannot_be_accounted_for(changes, words):
    with pytest.raises(ValueError, match=words):
        schedule(**changes)


@pytest.mark.parametrize(
    "changes", [{"num_bands": None}, {"num_bands": True}, {"num_steps": 10.0}, {"batch_size": "1"}]
)
def test_types_are_checked(changes):
    with pytest.raises(TypeError, match="Received: " + next(iter(changes))):
        schedule(**changes)


def test_bad_arguments():
    run = schedule()
    with pytest.raises(ValueError, match="steps=1001"):
        run.dp_event(1.0, 1001)
    with pytest.raises(ValueError, match="steps=-1"):
        run.dp_event(1.0, -1)
    for sigma in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise_multiplier"):
            run.dp_event(sigma)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            epsilon_of(run.dp_event(1.0), delta)
        with pytest.raises(ValueError, match="delta"):
            calibrate_noise(run, 1.0, delta)
    for epsilon in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon"):
            calibrate_noise(run, epsilon, 1e-5)


@pytest.mark.parametrize(
    "event",
    [
        dp_accounting.LaplaceDpEvent(1.0),
        dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(1.0)]),
        dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.0), 3),
        None,
    ],
)
def test_other_events_are_refused(event):
    with pytest.raises(ValueError, match="Expected an event made by"):
        epsilon_of(event, 1e-5)
