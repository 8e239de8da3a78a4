"""Save and restore: the law of the run survives, and nothing foreign is taken over."""

import functools

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import keras_bandmf as bandmf
from tests import runs


def new_run(make_model, plan, replicas=1, replay=False, seed=3):
    """A compiled private model whose optimizer is built, as before a restore."""

    def make():
        model = runs.compiled(make_model(), plan, seed=seed, replay=replay)
        model.optimizer.build(model.trainable_variables)
        return model

    return runs.in_scope(replicas, make)


def through_weights(model, other, path):
    """Saves and loads with `save_weights`."""
    model.save_weights(path / "run.weights.h5")
    other.load_weights(path / "run.weights.h5")
    return other


def through_checkpoint(model, other, path):
    """Saves and loads with `tf.train.Checkpoint`."""
    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(path / "run")
    target = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    target.restore(saved).assert_existing_objects_matched()
    return other


def through_keras_file(model, other, path):
    """Saves and loads a `.keras` file; `other` only says whether to replay."""
    model.save(path / "run.keras")
    loaded = keras.saving.load_model(path / "run.keras")
    return bandmf.privatize(loaded)


ROADS = [through_weights, through_checkpoint, through_keras_file]


@pytest.mark.parametrize("road", ROADS)
def test_noise_keeps_its_covariance_across_a_restore(road, tmp_path):
    """Chi-square over 64 steps, restored after 29; false-alarm rate 1e-4."""
    plan = runs.make_plan(num_bands=6, num_steps=64, noise_multiplier=2.0)
    data = runs.noise_data()
    model = new_run(runs.noise_model, plan)
    first = [
        runs.fit(model, plan.batches(*data)),
        runs.fit(model, plan.batches(*data), epochs=1, steps_per_epoch=5),
    ]
    key = model.optimizer.run_state.noise.get_key()
    model = road(model, new_run(runs.noise_model, plan, seed=4), tmp_path)
    second = runs.fit(model, plan.batches(*data), epochs=3)
    assert not np.array_equal(model.optimizer.run_state.noise.get_key(), key)
    updates = np.concatenate([*first, second])
    assert updates.shape == (64, 2000)
    statistic, degrees = runs.whitened_statistic(plan, updates)
    assert statistic < scipy.stats.chi2.isf(1e-4, degrees)


@functools.cache
def counted_in_one_go():
    """The updates of the counting model, never interrupted."""
    model = new_run(runs.counting_model, runs.make_plan(noise_multiplier=1e-3))
    return runs.fit(model, model.optimizer.plan.batches(*runs.counting_data()))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("replay", [False, True])
def test_sampler_groups_never_change_and_replay_is_exact(road, replay, tmp_path):
    """Rule 11: without replay only the noise differs; with it nothing does."""
    plan = runs.make_plan(noise_multiplier=1e-3)
    data = runs.counting_data()
    expected = counted_in_one_go()
    model = new_run(runs.counting_model, plan, replay=replay)
    first = runs.fit(model, plan.batches(*data), epochs=1, steps_per_epoch=9)
    restored = road(model, new_run(runs.counting_model, plan, replay=replay, seed=77), tmp_path)
    updates = np.concatenate([first, runs.fit(restored, plan.batches(*data), epochs=2)])
    assert updates.shape == expected.shape
    if replay:
        np.testing.assert_array_equal(updates, expected)
        assert "replay" in str(bandmf.statement(restored))
    else:
        assert np.abs(updates[9:] - expected[9:]).max() > 1e-4
        np.testing.assert_array_equal(np.round(updates * 8), np.round(expected * 8))
        assert "restored" in str(bandmf.statement(restored))


def test_a_restore_onto_two_replicas_goes_on_with_the_same_run(tmp_path):
    """With 2000 weights the second replica has a part of the ring to take over."""
    plan = runs.make_plan(noise_multiplier=1.0)
    data = runs.noise_data()
    whole = new_run(runs.noise_model, plan)
    expected = runs.fit(whole, plan.batches(*data))
    model = new_run(runs.noise_model, plan, replay=True)
    runs.fit(model, plan.batches(*data), epochs=1, steps_per_epoch=9)
    other = new_run(runs.noise_model, plan, replicas=2, replay=True, seed=8)
    restored = through_weights(model, other, tmp_path)
    updates = runs.fit(restored, plan.batches(*data), epochs=2)
    np.testing.assert_allclose(updates, expected[9:], atol=1e-5)


@pytest.mark.slow
def test_backup_and_restore_finishes_an_interrupted_run(tmp_path):
    plan = runs.make_plan(noise_multiplier=1e-3)
    data = runs.counting_data()

    class Interrupt(keras.callbacks.Callback):
        """Fails in the second epoch."""

        def on_epoch_begin(self, epoch, logs=None):
            """Raises once."""
            if epoch == 1:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    expected = counted_in_one_go()
    with pytest.raises(KeyboardInterrupt):
        runs.fit(
            new_run(runs.counting_model, plan, replay=True),
            plan.batches(*data),
            callbacks=[backup(), Interrupt()],
        )
    model = new_run(runs.counting_model, plan, seed=50, replay=True)
    runs.fit(model, plan.batches(*data), callbacks=[backup()])
    np.testing.assert_allclose(
        model.get_weights()[0][:, 0], -expected.sum(axis=0), rtol=1e-4, atol=1e-5
    )
    assert int(model.optimizer.iterations) == 24


def float64_counting_model():
    """Shapes of the counting model, another dtype."""
    layer = keras.layers.Dense(1, use_bias=False, dtype="float64")
    return bandmf.privatize(keras.Sequential([keras.Input((96,)), layer]))


CHANGES = {
    "dtype": lambda: new_run(float64_counting_model, runs.make_plan()),
    "plan": lambda: new_run(runs.counting_model, runs.make_plan(noise_multiplier=2.0)),
    "bands": lambda: new_run(runs.counting_model, runs.make_plan(num_bands=3)),
    "model": lambda: new_run(runs.noise_model, runs.make_plan()),
}


def other_clip():
    """A run with another clip norm."""
    model = runs.compiled(runs.counting_model(), runs.make_plan(), clip=0.5)
    model.optimizer.build(model.trainable_variables)
    return model


def other_inner():
    """A run with another inner optimizer."""
    model = runs.compiled(runs.counting_model(), runs.make_plan(), inner="adam")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize("make_other", [*CHANGES.values(), other_clip, other_inner])
def test_a_checkpoint_of_another_run_is_refused(make_other, tmp_path):
    """Rule 11: state that does not fit is an error."""
    model = new_run(runs.counting_model, runs.make_plan())
    arrays = model.optimizer.run_state.to_arrays()
    other = make_other().optimizer.run_state
    before = {name: value.copy() for name, value in other.to_arrays().items()}
    with pytest.raises(ValueError, match="another run"):
        other.from_arrays(arrays, replay=False)
    for name, value in other.to_arrays().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_foreign_weights_file_raises_through_keras(tmp_path):
    model = new_run(runs.counting_model, runs.make_plan())
    model.save_weights(tmp_path / "run.weights.h5")
    with pytest.raises(ValueError, match="another run"):
        CHANGES["plan"]().load_weights(tmp_path / "run.weights.h5")
    plain = runs.counting_model()
    plain.compile("sgd", "mse")
    plain.save_weights(tmp_path / "plain.weights.h5")
    with pytest.raises(ValueError):
        new_run(runs.counting_model, runs.make_plan()).load_weights(tmp_path / "plain.weights.h5")


def test_a_restore_into_an_unbuilt_optimizer_is_refused(tmp_path):
    model = new_run(runs.counting_model, runs.make_plan())
    model.save_weights(tmp_path / "run.weights.h5")
    fresh = runs.compiled(runs.counting_model(), runs.make_plan())
    with pytest.raises(ValueError, match="build"):
        fresh.load_weights(tmp_path / "run.weights.h5")


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: arrays.pop("noise_ring"),
        lambda arrays: arrays.update(noise_ring=arrays["noise_ring"][:, :-1]),
        lambda arrays: arrays.update(sampler_key=arrays["sampler_key"][:1]),
        lambda arrays: arrays.update(format=np.array(99, np.int32)),
        lambda arrays: arrays.update(fingerprint=np.zeros(64, np.uint8)),
        lambda arrays: arrays.clear(),
    ],
    ids=["missing", "short_ring", "short_key", "format", "fingerprint", "empty"],
)
def test_a_damaged_state_is_refused(damage):
    state = new_run(runs.counting_model, runs.make_plan()).optimizer.run_state
    arrays = dict(state.to_arrays())
    damage(arrays)
    with pytest.raises(ValueError):
        state.from_arrays(arrays, replay=False)


def test_a_seeded_run_stays_not_private_after_a_restore(tmp_path):
    model = new_run(runs.counting_model, runs.make_plan(), seed=1)
    other = new_run(runs.counting_model, runs.make_plan(), seed=None)
    assert bandmf.statement(other).private
    assert not bandmf.statement(through_weights(model, other, tmp_path)).private


@pytest.mark.parametrize("road", [through_weights, through_checkpoint])
def test_a_checkpoint_within_fit_says_what_the_callbacks_did(road, tmp_path):
    """Its `fit` has not ended yet, and is the run that the restored weights come from."""
    plan, data = runs.make_plan(num_steps=24), runs.counting_data()
    other = new_run(runs.counting_model, plan, seed=None)
    saves = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch or road(model, other, tmp_path)
    )
    model = new_run(runs.counting_model, plan, seed=None)
    stops = keras.callbacks.EarlyStopping("val_loss")
    model.fit(
        plan.batches(*data), validation_data=data, callbacks=[stops, saves], verbose=0, epochs=2
    )
    statement = bandmf.statement(other)
    assert any("EarlyStopping(val_loss)" in caveat for caveat in statement.caveats)
    assert (statement.steps_run, statement.steps_charged) == (12, 24)
    assert statement.data.startswith("plan.batches of plan")
