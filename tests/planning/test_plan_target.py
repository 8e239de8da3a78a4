"""A target in place of a plan: what it takes, and the plan that is made for it."""

import json

import keras
import pytest

import keras_bandmf as bandmf
from keras_bandmf.planning.plan_target import CalibrationOptions, PlanOfRun, PlanTarget
from tests import plans

TARGET = PlanTarget(epsilon=2.0, delta=1e-5, num_bands=2)


def plan_for(target, optimizer="adam", **changes):
    """The plan of a target for 96 rows."""
    numbers = {"num_examples": 96, "batch_size": 8, "epochs": 2, "num_steps": None}
    return target.plan_for(optimizer=keras.optimizers.get(optimizer), **(numbers | changes))


def calibrated(**changes):
    """The same by `calibrate`."""
    numbers = {"num_examples": 96, "batch_size": 8, "epochs": 2, "epsilon": 2.0, "delta": 1e-5}
    return bandmf.TrainingPlan.calibrate(**(numbers | changes))


@pytest.mark.parametrize(
    "options",
    [
        {"num_bands": 2},
        {},
        {"max_bands": 2},
        {"sampling": "fixed_order", "num_bands": 3},
        {"sampling": "auto"},
        {"num_bands": 2, "amplification": "secret_group"},
    ],
    ids=str,
)
def test_the_plan_is_that_of_calibrate(options):
    assert plan_for(PlanTarget(epsilon=2.0, delta=1e-5, **options)) == calibrated(**options)


def test_steps_in_place_of_epochs():
    made = plan_for(TARGET, epochs=None, num_steps=10)
    assert made == calibrated(epochs=None, num_steps=10, num_bands=2)


def test_noise_is_made_for_the_workload_of_an_sgd_that_has_one():
    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    assert plan_for(TARGET, sgd) == calibrated(num_bands=2, workload=sgd)
    assert plan_for(TARGET, sgd).workload.momentum == 0.9
    cosine = keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 24))
    assert plan_for(TARGET, cosine) == calibrated(num_bands=2, workload=cosine)


@pytest.mark.parametrize(
    "optimizer", ["adam", "sgd", keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True)]
)
def test_other_optimizers_get_prefix_sums(optimizer):
    assert plan_for(TARGET, optimizer) == calibrated(num_bands=2)


@pytest.mark.parametrize("name", sorted(CalibrationOptions.__annotations__))
@pytest.mark.parametrize("value", [0, -1, 1.5, "best", [], True])
def test_bad_values_are_refused_at_once(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        PlanTarget(epsilon=2.0, delta=1e-5, **{name: value})


@pytest.mark.parametrize("epsilon", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_bad_epsilons_are_refused_at_once(epsilon):
    with pytest.raises((TypeError, ValueError), match="epsilon"):
        PlanTarget(epsilon=epsilon, delta=1e-5)


@pytest.mark.parametrize("delta", [0, 1.0, float("nan"), "1e-5", None])
def test_bad_deltas_are_refused_at_once(delta):
    with pytest.raises((TypeError, ValueError), match="delta"):
        PlanTarget(epsilon=2.0, delta=delta)


def test_a_plan_is_settled_once():
    held = PlanOfRun(None, TARGET)
    with pytest.raises(ValueError, match=r"model\.fit.*TrainingPlan\.calibrate.*epsilon=2\.0"):
        _ = held.plan
    plan = plans.make_plan()
    held.settle(plan)
    held.settle(plans.make_plan())
    with pytest.raises(ValueError, match="second plan"):
        held.settle(plans.make_plan(noise_multiplier=2.0))
    assert held.plan is not None and held.plan == plan


@pytest.mark.parametrize(("known", "began", "kept"), [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)])
def test_a_plan_without_a_run_is_forgotten_after_a_failure(known, began, kept):
    held = PlanOfRun(None, TARGET)
    if known:
        held.settle(plans.make_plan())
    with pytest.raises(KeyError), held.kept_if(lambda: bool(began)):
        held.settle(plans.make_plan())
        raise KeyError
    assert held.known == bool(kept)


def test_a_plan_goes_through_a_file():
    held, other = PlanOfRun(None, TARGET), PlanOfRun(None, TARGET)
    held.settle(plans.make_plan())
    other.take_over(json.loads(json.dumps(held.to_facts())))
    assert other.plan == held.plan
    assert PlanOfRun(plans.make_plan()).to_facts() is None


@pytest.mark.parametrize(
    "facts",
    [
        None,
        "text",
        {},
        {"target": TARGET.get_config(), "plan": None},
        {"target": {**TARGET.get_config(), "epsilon": 8.0}, "plan": plans.make_plan().to_json()},
        {"target": None, "plan": plans.make_plan().to_json()},
    ],
    ids=["none", "text", "empty", "no plan", "other epsilon", "given plan"],
)
def test_a_plan_for_another_target_is_not_taken_over(facts):
    held = PlanOfRun(None, TARGET)
    with pytest.raises(ValueError, match="same target"):
        held.take_over(facts)
    assert not held.known
