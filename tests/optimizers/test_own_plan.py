"""BandMFOptimizer with a target in place of a plan, before and after the plan is made."""

import copy
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from tests import runs


def make(**changes):
    """An optimizer that has no plan yet."""
    options = {"epsilon": 2.0, "delta": 1e-5, "num_bands": 2, "l2_norm_clip": 0.7}
    return bandmf.BandMFOptimizer("adam", **(options | changes))


@pytest.mark.parametrize(
    "options",
    [{"epsilon": 2.0, "delta": 1e-5}, {"epsilon": 2.0}, {"delta": 1e-5}, {"sampling": "auto"}],
    ids=str,
)
def test_a_plan_and_a_target_are_not_given_together(options):
    with pytest.raises(ValueError, match="not both"):
        bandmf.BandMFOptimizer("adam", runs.make_plan(), **options)


@pytest.mark.parametrize("options", [{"epsilon": 2.0}, {"delta": 1e-5}, {"num_bands": 3}], ids=str)
def test_half_a_target_is_refused(options):
    with pytest.raises(ValueError, match="both `epsilon` and `delta`"):
        bandmf.BandMFOptimizer("adam", **options)


@pytest.mark.parametrize("name", ["num_examples", "batch_size", "seeed", "min_separation"])
def test_unknown_arguments_are_refused_by_name(name):
    with pytest.raises(TypeError, match=name):
        make(**{name: 5})


def test_what_needs_a_plan_says_how_to_get_one():
    optimizer = make()
    model = runs.counting_model()
    model.compile(optimizer, loss="mse")
    x, y = runs.counting_data()
    clipped = bandmf.clipped_gradients(model, x[:3], y[:3], l2_norm_clip=0.7)
    actions = [
        lambda: optimizer.plan,
        lambda: optimizer.run_state,
        lambda: bandmf.statement(model),
        lambda: optimizer.apply_clipped(clipped, model.trainable_variables),
        lambda: model.fit(runs.make_plan().batches(x, y), verbose=0),
    ]
    for action in actions:
        with pytest.raises(ValueError, match=r"no plan yet.*TrainingPlan\.calibrate"):
            action()
    assert optimizer.steps_done == 0 and not optimizer.built


def test_building_waits_for_the_plan():
    optimizer, model = make(), runs.counting_model()
    optimizer.build(model.trainable_variables)
    optimizer.build(model.trainable_variables)
    assert optimizer.inner_optimizer.built and not optimizer.built
    with pytest.raises(ValueError, match="no trainable variable"):
        optimizer.build([])


def test_the_config_has_the_target_and_then_the_plan():
    """Rule 10: and neither key nor seed."""
    optimizer = make(seed=123456789, sampling="fixed_order", epochs=7)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    assert "123456789" not in str(config)
    other = keras.saving.deserialize_keras_object(config)
    assert not other.plan_of_run.known
    assert other.plan_of_run.target == optimizer.plan_of_run.target
    plan = runs.make_plan()
    optimizer.plan_of_run.settle(plan)
    for again in (copy.deepcopy(optimizer), type(optimizer).from_config(optimizer.get_config())):
        assert again.plan == plan
        assert again.get_config() == optimizer.get_config()
        assert again.plan_of_run.target.epochs == 7


def test_the_config_of_a_given_plan_is_as_before():
    config = bandmf.BandMFOptimizer("sgd", runs.make_plan()).get_config()
    assert "target" not in config and config["plan"] == runs.make_plan().to_json()


def test_a_checkpoint_from_before_the_plan_begins_a_new_run(tmp_path):
    model = runs.counting_model()
    model.compile(make(), loss="mse")
    model.optimizer.build(model.trainable_variables)
    saved = tf.train.Checkpoint(optimizer=model.optimizer).save(tmp_path / "run")
    other = make()
    tf.train.Checkpoint(optimizer=other).restore(saved).expect_partial()
    other.build(model.trainable_variables)
    other.check_restored()
    model.save(tmp_path / "model.keras")
    loaded = bandmf.privatize(keras.saving.load_model(tmp_path / "model.keras"))
    x, y = runs.counting_data()
    loaded.fit(x, y, batch_size=8, epochs=1, verbose=0)
    assert loaded.optimizer.steps_done == 12
    np.testing.assert_equal(loaded.optimizer.plan.epsilon() <= 2.0, True)


def test_earlier_runs_are_not_forgotten_by_an_optimizer_without_a_plan(tmp_path):
    model = runs.compiled(runs.counting_model(), runs.make_plan())
    runs.fit(model, model.optimizer.plan.batches(*runs.counting_data()))
    model.compile(bandmf.BandMFOptimizer("sgd", epsilon=4.0, delta=1e-5, num_bands=1), loss="mse")
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(bandmf.PrivacyError, match="earlier private runs"):
        model.save_weights(tmp_path / "run.weights.h5")
    with pytest.raises(bandmf.PrivacyError, match="earlier private runs"):
        tf.train.Checkpoint(optimizer=model.optimizer).save(tmp_path / "run")


def test_a_plan_that_the_variables_refuse_leaves_nothing_built():
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(30), keras.layers.Dense(1)])
    bandmf.enable_rgp(model, rank=2)
    optimizer = bandmf.BandMFOptimizer("sgd", runs.make_plan(num_bands=3), l2_norm_clip=1.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="strategy"):
            optimizer.build(model.trainable_variables)
        assert not optimizer.built and optimizer.steps_done == 0
