"""BandMFOptimizer: what it accepts, adds and refuses."""

import copy
import dataclasses
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from tests import runs


def declared_plan(**changes):
    """A plan that leaves the data to the user, as a loop of one's own needs."""
    options = {"sampling": "fixed_order", "max_participations": 2, "min_separation": 12}
    return runs.make_plan(**(options | changes))


def loop_model():
    """A small model, its variables set to one."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    for variable in model.trainable_variables:
        variable.assign(tf.ones_like(variable.value))
    return model


X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.zeros((8, 1), np.float32)


def clipped(model, clip=1.0, x=X, y=Y):
    """Clipped gradients of the squared error."""
    return bandmf.clipped_gradients(model, x, y, l2_norm_clip=clip, loss="mse")


def test_update_is_sum_plus_noise_over_the_expected_batch_size():
    """Rule 2: the divisor is the plan's 8, though three examples are given."""
    plan = declared_plan(noise_multiplier=1.5)
    model = loop_model()
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(1.0), plan, 0.5, seed=9)
    gradients = clipped(model, 0.5, X[:3], Y[:3])
    before = [variable.numpy() for variable in model.trainable_variables]
    optimizer.apply_clipped(gradients, model.trainable_variables)
    shapes = [variable.shape for variable in model.trainable_variables]
    stddev = optimizer.run_state.noise.stddev  # the plan's, and what numbers cost
    assert plan.noise_stddev(0.5) < stddev < 1.001 * plan.noise_stddev(0.5)
    noise = bandmf.noise.CorrelatedNoise(plan.strategy, stddev, shapes)
    noise.set_key(optimizer.run_state.noise.get_key())
    for old, new, total, row in zip(
        before, model.trainable_variables, gradients.sums, noise.next(), strict=True
    ):
        np.testing.assert_allclose(new.numpy(), old - (total + row) / 8, rtol=1e-5, atol=1e-6)


def test_penalties_are_added_after_the_division():
    plan = declared_plan(noise_multiplier=1e-7)
    model = loop_model()
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(1.0), plan)
    gradients = clipped(model, x=X[:0], y=Y[:0])
    penalties = [None, None, tf.constant([[2.0], [3.0]]), None]
    optimizer.apply_clipped(gradients, model.trainable_variables, penalties)
    np.testing.assert_allclose(model.trainable_variables[2].numpy(), [[-1.0], [-2.0]], atol=1e-5)


@pytest.mark.parametrize("inner", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "lion", "nadam"])
def test_wraps_any_keras_optimizer(inner):
    """With next to no noise the update is that of the inner optimizer on the mean."""
    model, plain = loop_model(), loop_model()
    optimizer = bandmf.BandMFOptimizer(inner, declared_plan(noise_multiplier=1e-8), 1e3)
    reference = keras.optimizers.get(inner)
    for _ in range(3):
        optimizer.apply_clipped(clipped(model, 1e3), model.trainable_variables)
        mean = [total / 8 for total in clipped(plain, 1e3).sums]
        reference.apply(mean, plain.trainable_variables)
    for private, public in zip(model.trainable_variables, plain.trainable_variables, strict=True):
        np.testing.assert_allclose(private.numpy(), public.numpy(), rtol=1e-3, atol=1e-4)
    assert int(optimizer.iterations) == 3


@pytest.mark.parametrize("jit_compile", [False, True])
def test_step_beyond_the_plan_is_an_error_or_nan(jit_compile):
    """Rule 8: asserts vanish under XLA, so the graph's update becomes NaN."""
    plan = declared_plan(num_steps=4, num_bands=2, max_participations=1)
    model = loop_model()
    optimizer = bandmf.BandMFOptimizer("sgd", plan, seed=1)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit_compile)
    def step():
        optimizer.apply_clipped(clipped(model), model.trainable_variables)

    for _ in range(4):
        step()
    assert all(np.isfinite(variable.numpy()).all() for variable in model.trainable_variables)
    with pytest.raises(ValueError, match="4 steps"):
        optimizer.apply_clipped(clipped(model), model.trainable_variables)
    step()
    assert all(np.isnan(variable.numpy()).all() for variable in model.trainable_variables)


@pytest.mark.parametrize("compiled", [None, {}, {"jit_compile": True}])
def test_mixed_rows_make_every_update_nan(compiled):
    """Rule 8: clipping bounds nothing then."""
    model = loop_model()
    optimizer = bandmf.BandMFOptimizer("sgd", declared_plan(), seed=1)
    optimizer.build(model.trainable_variables)

    def step(mixed):
        sums = dataclasses.replace(clipped(model), rows_mixed=mixed)
        optimizer.apply_clipped(sums, model.trainable_variables)

    if compiled is not None:
        step = tf.function(step, **compiled)
    step(tf.constant(False))
    assert all(np.isfinite(variable.numpy()).all() for variable in model.trainable_variables)
    step(tf.constant(True))
    assert all(np.isnan(variable.numpy()).all() for variable in model.trainable_variables)


@pytest.mark.parametrize(
    "gradients",
    [[tf.zeros((3, 2))], None, tf.zeros(3), {"sums": []}],
    ids=["list", "none", "tensor", "dict"],
)
def test_anything_but_clipped_gradients_is_refused(gradients):
    """Rule 1."""
    optimizer = bandmf.BandMFOptimizer("sgd", declared_plan())
    with pytest.raises(TypeError, match="ClippedGradients"):
        optimizer.apply_clipped(gradients, loop_model().trainable_variables)


def test_another_clip_norm_is_refused():
    """Rule 1: the noise is scaled to the optimizer's norm."""
    model = loop_model()
    optimizer = bandmf.BandMFOptimizer("sgd", declared_plan(), l2_norm_clip=0.5)
    with pytest.raises(ValueError, match="l2_norm_clip=0.5"):
        optimizer.apply_clipped(clipped(model, 1.0), model.trainable_variables)


@pytest.mark.parametrize("method", ["apply", "apply_gradients", "stateless_apply"])
def test_plain_gradients_are_refused(method):
    """Rule 1."""
    model = loop_model()
    optimizer = bandmf.BandMFOptimizer("sgd", declared_plan())
    variables = model.trainable_variables
    zeros = [tf.zeros(variable.shape) for variable in variables]
    arguments = {
        "apply": (zeros, variables),
        "apply_gradients": (list(zip(zeros, variables, strict=True)),),
        "stateless_apply": ([], zeros, variables),
    }[method]
    with pytest.raises(ValueError, match="privatize"):
        getattr(optimizer, method)(*arguments)


def test_a_loop_of_ones_own_needs_declared_participations():
    """Rule 7."""
    model = loop_model()
    for plan in (runs.make_plan(), runs.make_plan(sampling="fixed_order")):
        optimizer = bandmf.BandMFOptimizer("sgd", plan)
        with pytest.raises(ValueError, match="not accounted"):
            optimizer.apply_clipped(clipped(model), model.trainable_variables)


def test_other_variables_are_refused():
    model = loop_model()
    optimizer = bandmf.BandMFOptimizer("sgd", declared_plan())
    optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="same order"):
        optimizer.apply_clipped(clipped(model), model.trainable_variables[::-1])
    with pytest.raises(ValueError, match="no trainable variable"):
        bandmf.BandMFOptimizer("sgd", declared_plan()).build([])


@pytest.mark.parametrize(
    "setting",
    [
        {"clipnorm": 1.0},
        {"clipvalue": 1.0},
        {"global_clipnorm": 1.0},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 2.0},
        {"use_ema": True, "ema_overwrite_frequency": 5},
    ],
    ids=lambda setting: list(setting)[-1],
)
def test_inner_settings_that_act_before_the_sum_are_refused(setting):
    with pytest.raises(ValueError, match=list(setting)[-1]):
        bandmf.BandMFOptimizer(keras.optimizers.SGD(0.1, **setting), runs.make_plan())


def test_inner_wrappers_are_refused():
    inner = bandmf.BandMFOptimizer("sgd", runs.make_plan())
    for wrapper in (inner, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())):
        with pytest.raises(ValueError, match="inner optimizer"):
            bandmf.BandMFOptimizer(wrapper, runs.make_plan())


@pytest.mark.parametrize("clip", [0, -1.0, np.nan, np.inf, "1", None, True])
def test_bad_clip_norms_are_refused(clip):
    with pytest.raises((TypeError, ValueError), match="l2_norm_clip"):
        bandmf.BandMFOptimizer("sgd", runs.make_plan(), l2_norm_clip=clip)


@pytest.mark.parametrize("plan", [None, {}, "plan", 3])
def test_bad_plans_are_refused(plan):
    with pytest.raises(TypeError, match="TrainingPlan"):
        bandmf.BandMFOptimizer("sgd", plan)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_bad_seeds_are_refused(seed):
    with pytest.raises((TypeError, ValueError), match="seed"):
        bandmf.BandMFOptimizer("sgd", runs.make_plan(), seed=seed)


def test_config_round_trip_holds_no_secret():
    """Rule 10: neither key nor seed is in the config."""
    optimizer = bandmf.BandMFOptimizer(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 10)),
        runs.make_plan(),
        l2_norm_clip=0.7,
        seed=123456789,
        replay=True,
        name="mine",
    )
    optimizer.build(loop_model().trainable_variables)
    config = keras.saving.serialize_keras_object(optimizer)
    assert "123456789" not in str(config)
    for value in optimizer.run_state.to_arrays()["sampler_key"]:
        assert str(value) not in str(config)
    other = keras.saving.deserialize_keras_object(config)
    assert keras.saving.serialize_keras_object(other) == config
    assert other.plan == optimizer.plan and other.seed is None


def test_learning_rate_is_that_of_the_inner_optimizer():
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(0.25), runs.make_plan())
    assert float(optimizer.learning_rate) == 0.25
    optimizer.learning_rate = 0.5
    assert float(optimizer.inner_optimizer.learning_rate) == 0.5


def test_keys_of_two_runs_differ_and_noise_and_sampler_use_different_ones():
    """Rule 10."""
    states = []
    for _ in range(2):
        optimizer = bandmf.BandMFOptimizer("sgd", runs.make_plan())
        optimizer.build(loop_model().trainable_variables)
        states.append(optimizer.run_state)
    keys = [key.tobytes() for s in states for key in (s.sampler_key, s.noise.get_key())]
    assert len(set(keys)) == 4


def test_secret_state_is_not_among_the_variables():
    optimizer = bandmf.BandMFOptimizer("adam", runs.make_plan())
    optimizer.build(loop_model().trainable_variables)
    names = [variable.path for variable in optimizer.variables]
    assert not [name for name in names if "noise" in name or "key" in name]


def test_a_compiled_loop_on_fewer_replicas_than_the_noise_is_refused():
    """The part of a replica that is not there would have no noise."""
    with runs.mirrored().scope():
        model = loop_model()
        optimizer = bandmf.BandMFOptimizer("sgd", declared_plan())
        optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="2 replicas.*scope"):
        tf.function(
            lambda: optimizer.apply_clipped(clipped(model), model.trainable_variables),
            autograph=False,
        )()


def test_an_optimizer_with_the_state_of_a_run_is_not_copied_alone():
    model = runs.compiled(runs.counting_model(), runs.make_plan(), seed=None)
    fresh = copy.deepcopy(model.optimizer)
    assert fresh.get_config() == model.optimizer.get_config()
    model.optimizer.build(model.trainable_variables)
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="by itself"):
            copier(model.optimizer)
