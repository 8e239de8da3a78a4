"""Runs on several rows a user, and on augmented views: what reaches the weights, and how often."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from tests import runs

NUM_USERS = 96
USERS = np.random.default_rng(1).permutation(np.repeat(np.arange(NUM_USERS), 3))
JIT = pytest.mark.parametrize("jit_compile", [False, True])
REPLICAS = pytest.mark.parametrize("replicas", [1, 2])
SAMPLINGS = pytest.mark.parametrize("sampling", ["cyclic_poisson", "random_allocation"])


def user_plan(**changes):
    if changes.get("sampling") == "random_allocation":
        changes = {"max_participations": 2} | changes
    return runs.make_plan(**({"noise_multiplier": 0.0, "unit": "user"} | changes))


def rows_data():
    """One-hot rows: row r moves weight r and no other."""
    return runs.counting_data(len(USERS))


def fitted(plan, replicas=1, jit_compile=False, data=None, batches=None, model_size=None, **fit):
    def make_model():
        return runs.counting_model(model_size or len(USERS))

    model = runs.compiled_in_scope(
        replicas, make_model, plan, jit_compile=jit_compile and replicas == 1
    )
    made = batches(plan) if batches else plan.batches(*rows_data(), unit=USERS, rows_per_unit=2)
    updates = runs.fit(model, made, **fit)
    return model, made, updates


@JIT
@REPLICAS
@SAMPLINGS
def test_each_step_moves_the_weights_by_the_mean_over_two_rows_of_each_user(
    jit_compile, replicas, sampling
):
    plan = user_plan(sampling=sampling)
    _, made, updates = fitted(plan, replicas, jit_compile)
    for t, update in enumerate(updates):
        rows = np.flatnonzero(update)
        np.testing.assert_allclose(update[rows] * plan.batch_size, 0.5, rtol=1e-6)
        whose, counts = np.unique(USERS[rows], return_counts=True)
        np.testing.assert_array_equal(whose, np.sort(made.indices(t)))
        assert (counts == 2).all()


def test_the_statement_is_about_users():
    model, _, _ = fitted(user_plan(noise_multiplier=1.0), epochs=1)
    statement = bandmf.statement(model)
    assert statement.unit == "user, with all rows of that user"
    assert statement.num_examples == NUM_USERS


def test_a_second_run_about_another_unit_is_refused():
    model, _, _ = fitted(user_plan(noise_multiplier=1.0), epochs=1)
    rows_plan = runs.make_plan(num_examples=len(USERS))
    runs.compiled(model, rows_plan)
    with pytest.raises(ValueError, match="the same `unit`"):
        runs.fit(model, rows_plan.batches(*rows_data()))


def test_batches_of_rows_do_not_train_a_plan_of_users():
    plan = user_plan(noise_multiplier=1.0)
    rows = bandmf.PrivateBatches(
        *runs.counting_data(), schedule=plan.schedule, plan_fingerprint=plan.fingerprint
    )
    model = runs.compiled(runs.counting_model(), plan)
    with pytest.raises(bandmf.PrivacyError, match="count what the plan counts"):
        runs.fit(model, rows)


def test_a_loop_clips_one_row_an_example():
    plan = runs.make_plan(sampling="fixed_order", max_participations=2, min_separation=12)
    model = runs.compiled(runs.counting_model(), plan)
    x, y = runs.counting_data()
    clipped = bandmf.clipped_gradients(model, x[:8], y[:8], rows_per_example=2)
    with pytest.raises(bandmf.PrivacyError, match="rows_per_example=2"):
        model.optimizer.apply_clipped(clipped, model.trainable_variables)


@keras.saving.register_keras_serializable(package="keras_bandmf_tests")
class MixesManyRows(keras.layers.Layer):
    """Subtracts the mean in batches of more rows than a check looks at by itself."""

    def call(self, x):
        mean = keras.ops.mean(x, axis=0, keepdims=True)
        return tf.where(tf.shape(x)[0] > 80, x - mean, x)


def test_the_check_of_declared_layers_sees_as_many_rows_as_training():
    bandmf.clipping.declare_row_wise(MixesManyRows)
    plan = runs.make_plan()
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(1)(MixesManyRows()(inputs)))
    runs.compiled(bandmf.privatize(model), plan)
    x = np.random.default_rng(0).integers(0, 9, (96, 4)).astype("float32")
    batches = plan.batches(x, np.zeros(96), augment=lambda x, seed: x, augment_copies=16)
    with pytest.raises(bandmf.PrivacyError):
        runs.fit(model, batches)
    assert model.optimizer.steps_done == 0  # by the check, not by a step that it let pass


@REPLICAS
def test_views_of_one_example_count_as_one(replicas):
    """Four views of row i are that row, scaled: their mean gradient is clipped once to norm 1."""
    plan = runs.make_plan(noise_multiplier=0.0)

    def scaled(x, seed):
        return x * tf.random.stateless_uniform([], seed, 5.0, 50.0)

    def batches(plan):
        x, y = runs.counting_data(96)
        return plan.batches(x, y, augment=scaled, augment_copies=4)

    _, made, updates = fitted(plan, replicas, batches=batches, model_size=96)
    for t, update in enumerate(updates):
        expected = np.zeros(96)
        expected[made.indices(t)] = 1 / plan.batch_size
        np.testing.assert_allclose(update, expected, atol=1e-6)


def small_model():
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Conv2D(3, 3, activation="relu")(inputs)
    x = keras.layers.Dropout(0.3)(keras.layers.Flatten()(x))
    return bandmf.privatize(keras.Model(inputs, keras.layers.Dense(1)(x)))


def pictures(plan):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(96, 6, 6, 1)).astype("float32")
    augment = keras.Sequential(
        [keras.layers.RandomTranslation(0.2, 0.2), keras.layers.RandomFlip("horizontal")]
    )
    return plan.batches(x, rng.normal(size=96), augment=augment, augment_copies=3)


def test_a_run_that_goes_on_sees_the_same_views(tmp_path):
    plan = runs.make_plan()
    keras.utils.set_random_seed(0)
    whole = runs.compiled(small_model(), plan, replay=True)
    start = whole.get_weights()
    runs.fit(whole, pictures(plan))

    first = runs.compiled(small_model(), plan, replay=True)
    first.set_weights(start)
    first.optimizer.build(first.trainable_variables)
    runs.fit(first, pictures(plan), epochs=1)
    first.save_weights(tmp_path / "run.weights.h5")
    second = runs.compiled(small_model(), plan, replay=True)
    second.optimizer.build(second.trainable_variables)
    second.load_weights(tmp_path / "run.weights.h5")
    runs.fit(second, pictures(plan), epochs=1)
    for ours, theirs in zip(whole.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_does_not_go_on_with_rows_of_other_users(tmp_path):
    plan = user_plan(noise_multiplier=1.0)
    model, _, _ = fitted(plan, epochs=1)
    model.save_weights(tmp_path / "run.weights.h5")
    other = runs.compiled(runs.counting_model(len(USERS)), plan)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "run.weights.h5")
    swapped = USERS.copy()
    swapped[:6] = swapped[5::-1]
    with pytest.raises(ValueError, match="rows"):
        runs.fit(other, plan.batches(*rows_data(), unit=swapped, rows_per_unit=2))


def test_metrics_count_every_row_that_took_part():
    plan = user_plan()
    model = runs.counting_model(len(USERS))
    runs.compiled(model, plan, metrics=["mae"])
    data = plan.batches(*rows_data(), unit=USERS, rows_per_unit=2)
    history = model.fit(data, epochs=2, verbose=0)
    assert np.isfinite(history.history["mae"]).all() and np.isfinite(history.history["loss"]).all()


def test_the_share_of_clipped_examples_counts_users():
    plan = user_plan()
    model = bandmf.privatize(runs.counting_model(len(USERS)), report_clipping=True)
    runs.compiled(model, plan, clip=0.5)
    data = plan.batches(*rows_data(), unit=USERS, rows_per_unit=2)
    history = model.fit(data, epochs=1, verbose=0)
    # The mean of two orthogonal gradients of norm 1 has norm 0.71.
    assert history.history["clipped_fraction_not_private"] == [1.0]
