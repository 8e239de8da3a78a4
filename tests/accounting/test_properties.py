"""Properties of epsilon over drawn plans, and extreme values."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_bandmf.accounting.accountant import calibrate_noise, epsilon_of
from keras_bandmf.accounting.composition import dp_event
from keras_bandmf.planning.plan import TrainingPlan
from tests.plans import make_plan, make_schedule

DRAWN = settings(max_examples=12, deadline=None, derandomize=True)
LAWS = st.sampled_from(["cyclic_poisson", "fixed_order"])
# Epsilon is an upper bound, above the exact value by about 10^-5 of it.
SLACK = 1 + 3e-5


@DRAWN
@given(sampling=LAWS, sigma=st.floats(0.4, 8), factor=st.floats(1.01, 3), bands=st.integers(1, 8))
def test_epsilon_falls_with_noise(sampling, sigma, factor, bands):
    run = make_schedule(sampling=sampling, num_bands=bands)
    less, more = (epsilon_of(run.dp_event(each), 1e-6) for each in (sigma, sigma * factor))
    assert more < less or more == less == 0.0


@DRAWN
@given(sampling=LAWS, sigma=st.floats(0.4, 8), steps=st.integers(0, 999), bands=st.integers(1, 8))
def test_epsilon_never_falls_with_steps(sampling, sigma, steps, bands):
    run = make_schedule(sampling=sampling, num_bands=bands)
    fewer, more = (epsilon_of(run.dp_event(sigma, each), 1e-6) for each in (steps, steps + 1))
    assert fewer <= more * SLACK


@DRAWN
@given(sampling=LAWS, epsilon=st.floats(0.1, 20), bands=st.integers(1, 8))
def test_calibration_and_epsilon_are_inverse(sampling, epsilon, bands):
    run = make_schedule(sampling=sampling, num_bands=bands)
    sigma = calibrate_noise(run, epsilon, 1e-6)
    found = epsilon_of(run.dp_event(sigma), 1e-6)
    assert epsilon * (1 - 1e-4) <= found <= epsilon


@DRAWN
@given(sigma=st.floats(0.4, 8), epochs=st.integers(1, 5))
def test_one_band_is_dp_sgd(sigma, epochs):
    plan = make_plan(num_bands=1, noise_multiplier=sigma, epochs=epochs)
    assert plan.epsilon() == epsilon_of(dp_event((20 * epochs, 0.05, sigma)), plan.delta)


@pytest.mark.slow
@pytest.mark.parametrize("bands", [4, 12])
def test_a_secret_group_costs_no_more_than_a_known_one(bands):
    plan = TrainingPlan.calibrate(
        num_examples=2_000, batch_size=100, epochs=2, num_bands=bands, epsilon=2.0, delta=1e-4,
        sampling="cyclic_poisson", amplification="secret_group",
    )  # fmt: skip
    assert plan.certificate is not None
    assert plan.epsilon() <= epsilon_of(plan.dp_event(), plan.delta)
    assert plan.epsilon() <= 2.0


@pytest.mark.parametrize("sigma", [0.0, 1e-300, 1e-6, 1e-3, 1e6, 1e300])
@pytest.mark.parametrize("delta", [1e-100, 1e-12, 0.999])
def test_extreme_values_have_an_answer(sigma, delta):
    epsilon = make_plan(noise_multiplier=sigma, delta=delta).epsilon()
    assert epsilon >= 0.0 and (epsilon == math.inf) == (sigma < 1e-6)


@pytest.mark.parametrize("delta", [0.0, 1.0, 1e-101, math.nan, -1.0, math.inf])
def test_extreme_deltas_are_refused_by_name(delta):
    with pytest.raises(ValueError, match="delta"):
        make_plan(delta=delta).epsilon()
