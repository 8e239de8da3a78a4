"""Plans of a strategy whose inverse is banded: accounted for in a fixed order only."""

import dataclasses
import math

import dp_accounting
import numpy as np
import pytest

import keras_bandmf as bandmf
from keras_bandmf.planning.arguments import check_strategy
from keras_bandmf.sampling.schedule import Schedule
from keras_bandmf.strategies import BandedInverseStrategy, ToeplitzStrategy
from tests.plans import make_schedule
from tests.strategies import reference

STRATEGY = BandedInverseStrategy.optimize(24, 3, 4, 6)
RUN = {"num_examples": 48, "batch_size": 8, "num_steps": 24, "delta": 1e-5}


def inverse_plan(**changes):
    """A plan of 24 steps, 4 epochs of 6."""
    options = {"strategy": STRATEGY, "sampling": "fixed_order", "noise_multiplier": 2.0}
    return bandmf.TrainingPlan(**(RUN | options | changes))


def truth(strategy, k, separation):
    """The largest norm of a sum of columns, over every pattern."""
    matrix = strategy.materialize()
    patterns = reference.patterns(strategy.num_steps, k, separation)
    return max(np.linalg.norm(matrix[:, pattern].sum(axis=1)) for pattern in patterns)


def test_sensitivity_is_that_of_the_plan_s_participations():
    plan = inverse_plan()
    assert plan.sensitivity == pytest.approx(truth(STRATEGY, 4, 6), rel=1e-12)
    assert plan.sensitivity > 1.05 * math.sqrt(4)
    assert plan.noise_stddev(0.5) == 2.0 * plan.sensitivity * 0.5
    declared = inverse_plan(max_participations=3, min_separation=5)
    assert declared.sensitivity == pytest.approx(truth(STRATEGY, 3, 5), rel=1e-12)
    once = inverse_plan(max_participations=1, min_separation=24)
    assert once.sensitivity == pytest.approx(1.0, rel=1e-12)


def test_every_number_of_steps_costs_the_whole_gaussian():
    """A shorter run cuts columns off, so the share of k is no bound: brute force says how much."""
    plan = inverse_plan()
    for steps in (None, 1, 6, 23, 24):
        assert plan.dp_event(steps) == dp_accounting.GaussianDpEvent(2.0)
        assert plan.epsilon(steps) == plan.epsilon()
    assert plan.dp_event(0) == dp_accounting.NoOpDpEvent()
    # The first 7 steps: two participations, and what the rest of the run would add is not there.
    part = STRATEGY.materialize()[:7]
    seen = max(
        np.linalg.norm(part[:, [i, i + 6][: 2 if i == 0 else 1]].sum(axis=1)) for i in (0, 1)
    )
    assert seen <= plan.sensitivity


def test_calibrated_plans_meet_epsilon_and_compare_by_expected_rmse():
    options = {"epsilon": 2.0, "sampling": "fixed_order", **RUN}
    plan = bandmf.TrainingPlan.calibrate(strategy=STRATEGY, **options)
    assert 1.99 < plan.epsilon() <= 2.0
    error = plan.noise_multiplier * plan.sensitivity * math.sqrt(STRATEGY.loss()) / 4
    assert plan.expected_rmse == pytest.approx(error)
    plain = bandmf.TrainingPlan.calibrate(num_bands=1, **options)
    assert plan.noise_multiplier == pytest.approx(plain.noise_multiplier, rel=1e-3)
    assert plan.expected_rmse < 0.8 * plain.expected_rmse


def test_json_table_and_statement():
    plan = inverse_plan()
    again = bandmf.TrainingPlan.from_json(plan.to_json())
    assert again == plan and again.sensitivity == plan.sensitivity
    assert "strategy_sensitivity" not in plan.to_json()
    words = "BandedInverseStrategy, C^-1 of 3 bands, drawn again from its key"
    assert words in str(plan)
    assert words in plan.statement().mechanism and plan.statement().num_bands == 24
    identity = inverse_plan(strategy=BandedInverseStrategy([1.0], 24))
    assert identity.num_bands == 1 and identity.sensitivity == pytest.approx(2.0)
    assert "independent" in identity.statement().mechanism


@pytest.mark.parametrize("sampling", ["cyclic_poisson", "auto"])
def test_other_sampling_is_refused(sampling):
    with pytest.raises(ValueError, match="fixed_order.*"):
        bandmf.TrainingPlan.calibrate(strategy=STRATEGY, epsilon=2.0, sampling=sampling, **RUN)
    # Also the identity, and also where one round of all bands would fit.
    for strategy in (STRATEGY, BandedInverseStrategy([1.0], 24)):
        with pytest.raises(ValueError, match="has no bands.*Received: strategy=.*sampling="):
            inverse_plan(strategy=strategy, num_examples=10_000, sampling="cyclic_poisson")


def test_comparing_bands_is_refused():
    with pytest.raises(ValueError, match="no bands to compare.*Received: strategy="):
        bandmf.compare_bands(strategy=STRATEGY, epsilon=2.0, sampling="fixed_order", **RUN)


def test_a_schedule_of_another_sensitivity_is_refused():
    """The schedule says what epsilon is computed from: it must be that of the very strategy."""
    schedule = inverse_plan().schedule
    check_strategy(STRATEGY, schedule)
    for wrong in (schedule.strategy_sensitivity * 0.99, None):
        with pytest.raises(ValueError, match="Expected|at most"):
            check_strategy(STRATEGY, dataclasses.replace(schedule, strategy_sensitivity=wrong))
    banded = ToeplitzStrategy([0.8, 0.6], 24)
    with pytest.raises(ValueError, match="sensitivity None.*Received: strategy_sensitivity=1.5"):
        own = dataclasses.replace(schedule, num_bands=2, strategy_sensitivity=1.5)
        check_strategy(banded, own)


def test_more_bands_than_the_separation_need_a_known_sensitivity():
    with pytest.raises(ValueError, match="at least `num_bands` steps apart"):
        make_schedule(sampling="fixed_order", num_bands=101)
    known = make_schedule(sampling="fixed_order", num_bands=101, strategy_sensitivity=5.0)
    assert known.sensitivity == 5.0
    with pytest.raises(ValueError, match="overlap.*Received: strategy_sensitivity=5.0, sampling="):
        make_schedule(strategy_sensitivity=5.0)
    for bad in (0.9, math.nan, -1.0, "5"):
        with pytest.raises((TypeError, ValueError), match="strategy_sensitivity"):
            make_schedule(sampling="fixed_order", strategy_sensitivity=bad)
    assert isinstance(known, Schedule)


def test_a_stranger_of_the_class_is_refused():
    class Stranger(BandedInverseStrategy):
        """Could claim any sensitivity."""

    with pytest.raises(ValueError, match="Received: strategy="):
        inverse_plan(strategy=Stranger([1.0, -0.5], 24))


def test_exact_noise_is_refused():
    plan = inverse_plan()
    with pytest.raises(ValueError, match="Received: noise='exact', strategy="):
        bandmf.BandMFOptimizer("sgd", plan, noise="exact")
