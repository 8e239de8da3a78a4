"""Plans for a workload: the strategy, the error, JSON, the guarantee, and bad input."""

import dataclasses
import json
import math

import keras
import numpy as np
import pytest

from keras_bandmf.planning.calibration import compare_bands
from keras_bandmf.planning.plan import TrainingPlan
from keras_bandmf.strategies import BandedStrategy, ToeplitzStrategy, Workload
from tests.plans import dense_workload, make_plan

N = 60
MOMENTUM = Workload(N, np.linspace(0.0, 0.2, N), momentum=0.9)
TARGET = {"num_examples": 1_000, "batch_size": 50, "epochs": 3, "epsilon": 2.0, "delta": 1e-5}


@pytest.fixture(scope="module")
def plan():
    return make_plan(workload=MOMENTUM)


def test_error_and_strategy_are_those_of_the_workload(plan):
    assert plan.workload == MOMENTUM
    assert plan.strategy == ToeplitzStrategy.optimize(N, 4, workload=MOMENTUM)
    factor = dense_workload(MOMENTUM) @ np.linalg.inv(plan.strategy.materialize())
    error = np.mean(np.sum(factor**2, axis=1))
    assert plan.expected_rmse == pytest.approx(1.5 * math.sqrt(error) / 3, rel=1e-9)
    ordinary = make_plan()
    assert ordinary.workload is None
    under_it = make_plan(
        num_bands=None,
        strategy=ToeplitzStrategy(ordinary.strategy.coefficients, N, workload=MOMENTUM),
    )
    assert plan.expected_rmse < under_it.expected_rmse


def test_the_guarantee_is_the_same(plan):
    ordinary = make_plan()
    assert plan.epsilon() == ordinary.epsilon()
    assert plan.noise_stddev(1.0) == pytest.approx(ordinary.noise_stddev(1.0), rel=1e-12)
    ours = dataclasses.replace(plan.statement(), plan_fingerprint=ordinary.fingerprint)
    assert ours == ordinary.statement()


def test_json_fingerprint_and_table(plan):
    again = TrainingPlan.from_json(plan.to_json())
    assert again == plan and again.workload == MOMENTUM
    assert again.expected_rmse == plan.expected_rmse
    document = json.loads(plan.to_json())
    document["strategy"]["workload"]["momentum"] = 0.8
    other = TrainingPlan.from_json(json.dumps(document))
    assert len({other.fingerprint, plan.fingerprint, make_plan().fingerprint}) == 3
    text = str(plan)
    assert "SGD, learning rates 0 to 0.2, momentum 0.9" in text
    assert "clip norms x learning rate" in text
    assert "prefix sums" in str(make_plan())
    nesterov = Workload(N, 0.1, momentum=0.5, nesterov=True, weight_decay=0.25)
    assert "SGD, learning rate 0.1, Nesterov momentum 0.5, weight decay 0.25" in str(
        make_plan(num_bands=1, workload=nesterov)
    )


def test_an_optimizer_stands_for_its_workload():
    made = make_plan(workload=keras.optimizers.SGD(0.25, momentum=0.5))
    assert made.workload == Workload(N, 0.25, momentum=0.5)
    assert made == make_plan(workload=Workload(N, 0.25, momentum=0.5))


def test_prefix_sums_spelt_out_are_the_default():
    assert make_plan(workload=Workload(N)) == make_plan()


def test_a_strategy_object_keeps_its_own(plan):
    strategy = plan.strategy
    assert make_plan(num_bands=None, strategy=strategy) == plan
    assert make_plan(num_bands=None, strategy=strategy, workload=MOMENTUM) == plan
    ordinary = ToeplitzStrategy([1.0, 0.5], N)
    assert make_plan(num_bands=None, strategy=ordinary, workload=Workload(N)).workload is None
    for own, given in ((strategy, Workload(N)), (ordinary, MOMENTUM)):
        with pytest.raises(ValueError, match="the one that the strategy was optimized for"):
            make_plan(num_bands=None, strategy=own, workload=given)
        with pytest.raises(ValueError, match="the one that the strategy was optimized for"):
            TrainingPlan.calibrate(**TARGET, strategy=own, sampling="auto", workload=given)


@pytest.mark.parametrize("name", ["toeplitz", "banded"])
def test_calibrate(name):
    made = TrainingPlan.calibrate(**TARGET, strategy=name, workload=MOMENTUM, max_bands=8)
    assert made.epsilon() <= 2.0
    assert made.workload == MOMENTUM
    single = TrainingPlan.calibrate(**TARGET, num_bands=1, workload=MOMENTUM)
    assert made.num_bands > 1
    assert made.expected_rmse < single.expected_rmse
    best = ToeplitzStrategy.optimize(N, made.num_bands, workload=MOMENTUM)
    if name == "toeplitz":
        assert made.strategy == best
    else:
        assert type(made.strategy) is BandedStrategy
        assert made.strategy.loss() <= best.loss() * (1 + 1e-12)


def curved(**changes):
    arguments = {"momentum": 0.9, "curvatures": [0.0, 1.0, 10.0], "curvature_weights": [1, 2, 3]}
    return Workload(N, np.linspace(0.1, 0.02, N), **(arguments | changes))


def test_a_plan_for_curvatures():
    made = make_plan(workload=curved())
    assert made.strategy == ToeplitzStrategy.optimize(N, 4, workload=curved())
    # What the noise does to a quadratic loss, step by step.
    inverse = np.linalg.inv(made.strategy.materialize())
    squares = 0.0
    for h, weight in zip(curved().curvatures, curved().curvature_weights, strict=True):
        velocity, moved = np.zeros(N), np.zeros(N)
        for rate, noise in zip(curved().learning_rates, inverse, strict=True):
            velocity = 0.9 * velocity + rate * (noise - h * moved)
            moved = moved + velocity
            squares += weight * np.sum(moved**2) / N
    assert made.expected_rmse == pytest.approx(1.5 * math.sqrt(squares) / 3, rel=1e-9)
    # The guarantee is that of any other plan.
    assert made.epsilon() == make_plan().epsilon()
    assert made.noise_stddev(1.0) == pytest.approx(make_plan().noise_stddev(1.0), rel=1e-12)
    assert "learning rates 0.02 to 0.1, momentum 0.9, 3 curvatures from 0 to 10" in str(made)
    one = curved(curvatures=[2.5], curvature_weights=None)
    assert "momentum 0.9, curvature 2.5" in str(make_plan(workload=one))


def test_curvatures_are_in_the_json_and_the_fingerprint():
    made = make_plan(workload=curved())
    again = TrainingPlan.from_json(made.to_json())
    assert again == made and again.workload == curved()
    document = json.loads(made.to_json())
    document["strategy"]["workload"]["curvatures"][2] = 9.0
    other = TrainingPlan.from_json(json.dumps(document))
    assert other.fingerprint != made.fingerprint
    document["strategy"]["workload"]["curvatures"][2] = 1e3
    with pytest.raises(ValueError, match="`curvatures` to be at most .* Received: a curvature"):
        TrainingPlan.from_json(json.dumps(document))
    # Plans of releases before there were curvatures.
    for name in ("curvatures", "curvature_weights"):
        del document["strategy"]["workload"][name]
    flat = TrainingPlan.from_json(json.dumps(document)).workload
    assert flat == curved(curvatures=[0.0], curvature_weights=None)


@pytest.mark.parametrize("name", ["toeplitz", "banded"])
def test_bands_are_chosen_for_the_curvatures(name):
    # Noise that training undoes within some steps is not worth many bands.
    steep = Workload(N, 0.1, curvatures=[5.0, 9.0])
    made = TrainingPlan.calibrate(**TARGET, strategy=name, workload=steep, max_bands=16)
    flat = TrainingPlan.calibrate(**TARGET, strategy=name, workload=MOMENTUM, max_bands=16)
    assert 1 <= made.num_bands < flat.num_bands
    assert made.workload == steep and made.epsilon() <= 2.0
    choice = compare_bands(**TARGET, workload=steep, max_bands=16)
    # Rows are compared by strategies that are nearly optimal.
    assert made.expected_rmse <= choice.best.expected_rmse <= 1.02 * made.expected_rmse
    for row in choice.candidates:
        best = ToeplitzStrategy.optimize(N, row.num_bands, workload=steep)
        assert row.strategy.loss() <= 1.02 * best.loss()


def test_bad_workloads():
    with pytest.raises(ValueError, match="60 steps.*workload.num_steps=61"):
        make_plan(workload=Workload(61))
    with pytest.raises(ValueError, match="60 steps.*workload.num_steps=61"):
        TrainingPlan.calibrate(**TARGET, workload=Workload(61))
    for wrong in ("sgd", 0.9, MOMENTUM.get_config()):
        with pytest.raises(TypeError, match="Received: workload="):
            make_plan(workload=wrong)
    with pytest.raises(ValueError, match="class Adam"):
        make_plan(workload=keras.optimizers.Adam())
    with pytest.raises(ValueError, match="not negative, and not all zero"):
        make_plan(workload=keras.optimizers.SGD(0.0))
