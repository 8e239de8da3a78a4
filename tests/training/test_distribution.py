"""Strategies other than MirroredStrategy, in one process: central storage, and those refused."""

from unittest import mock

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.training.fit_arguments import check_distribution
from tests import runs, worker_job


def central(first=0):
    """Two replicas with one place for variables."""
    replicas = [f"CPU:{first}", f"CPU:{1 - first}"]
    return tf.distribute.experimental.CentralStorageStrategy(replicas, "CPU:0")


def test_noise_of_central_storage_is_on_the_device_of_its_replica():
    """Not where TensorFlow puts a variable by itself: XLA on another device cannot read it."""
    plan = worker_job.regression_plan()
    with central(first=1).scope():
        noise = bandmf.noise.CorrelatedNoise(plan.strategy, 1.0, [(3,)])
    kept = [noise._key, noise._table, noise._ring, noise._position]
    assert [variable.device[-5:] for variable in kept] == ["CPU:1"] * 4


def test_central_storage_trains_to_the_weights_of_one_device():
    """The first replica keeps the whole ring; a restore goes on with the run."""
    plan, data = worker_job.regression_plan(), worker_job.regression_data()
    one = worker_job.regression_model()
    one.fit(plan.batches(*data), epochs=2, verbose=0)
    with central().scope():
        two = worker_job.regression_model()
    two.fit(plan.batches(*data), epochs=2, verbose=0)
    for first, second in zip(one.trainable_variables, two.trainable_variables, strict=True):
        np.testing.assert_allclose(second.numpy(), first.numpy(), atol=2e-5)
    noises = [model.optimizer.run_state.noise for model in (one, two)]
    assert noises[0].state_bytes == noises[1].state_bytes
    np.testing.assert_array_equal(noises[1].get_ring(), noises[0].get_ring())


@pytest.mark.slow
def test_noise_of_central_storage_has_the_covariance_of_the_mechanism():
    """Chi-square over all pairs of 64 steps in a compiled `fit`; false-alarm rate 1e-4."""
    plan = worker_job.covariance_plan()
    with central().scope():
        model = runs.compiled(runs.noise_model(), plan)
    updates = runs.fit(model, plan.batches(*runs.noise_data()), epochs=6)
    statistic, degrees = runs.whitened_statistic(plan, updates)
    assert statistic < scipy.stats.chi2.isf(1e-4, degrees)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tf.distribute.TPUStrategy, "not known by number"),
        (tf.distribute.ParameterServerStrategy, "different times"),
    ],
)
def test_other_strategies_are_refused_with_a_reason(kind, reason):
    """Stand-ins: the real ones need a TPU or a cluster to be made."""
    strategy = mock.Mock(spec=kind)
    model = mock.Mock(spec=keras.Model, distribute_strategy=strategy)
    with pytest.raises(ValueError, match=reason):
        check_distribution(model, None)


def test_an_unknown_strategy_is_refused():
    """Unknown means refused, also with one replica."""

    class Unknown(tf.distribute.Strategy):
        """Has the devices of a strategy that is known."""

    strategy = Unknown(tf.distribute.OneDeviceStrategy("CPU:0").extended)
    with strategy.scope():
        model = runs.compiled(runs.counting_model(), runs.make_plan())
    with pytest.raises(ValueError, match="Unknown"):
        model.fit(runs.make_plan().batches(*runs.counting_data()), verbose=0, epochs=1)


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: tf.distribute.OneDeviceStrategy("CPU:1"),
        lambda: tf.distribute.MirroredStrategy(["CPU:1"]),
        runs.mirrored,
    ],
    ids=["one_device", "mirrored_over_one", "mirrored"],
)
def test_a_fit_inside_the_scope_trains_as_no_strategy_does(strategy):
    def updates():
        model = runs.compiled(runs.counting_model(), runs.make_plan())
        return runs.fit(model, runs.make_plan().batches(*runs.counting_data()))

    with strategy().scope():
        scoped = updates()
    np.testing.assert_allclose(scoped, updates(), atol=1e-6)


def test_batches_with_no_row_at_all_are_steps_of_two_replicas():
    """Rule 4: a third of these batches is empty, and more have rows for one replica only."""
    plan = runs.make_plan(batch_size=1, noise_multiplier=5e-7)
    model = runs.compiled_in_scope(2, runs.counting_model, plan)
    batches = plan.batches(*runs.counting_data(), seed=5)
    updates = runs.fit(model, batches, epochs=1)
    expected = np.zeros((24, 96))
    for step in range(24):
        expected[step, batches.indices(step)] = 1.0
    assert not expected.any(axis=1).all()
    np.testing.assert_allclose(updates, expected, atol=1e-5)


def test_a_last_batch_of_one_row_leaves_the_second_replica_without_any():
    """Arrays in a declared order, as Keras cuts them."""
    plan = runs.make_plan(
        num_examples=97,
        num_steps=26,
        sampling="fixed_order",
        max_participations=2,
        min_separation=13,
        noise_multiplier=5e-7,
    )
    model = runs.compiled_in_scope(2, lambda: runs.counting_model(97), plan)
    x, y = runs.counting_data(97)
    updates = runs.fit(model, x, y=y)
    expected = np.zeros((13, 97))
    expected[np.arange(97) // 8, np.arange(97)] = 1 / 8
    np.testing.assert_allclose(updates, np.concatenate([expected, expected]), atol=1e-5)
