"""Ordinary actions that would break the promise silently: each is refused or charged in full."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from tests import runs

DATA = runs.counting_data()


def trained(steps=None, **options):
    """A private counting model after an epoch of 12 steps, or after `steps`."""
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan, **options)
    model.fit(plan.batches(*DATA), epochs=1, steps_per_epoch=steps, verbose=0)
    return model, plan


def rewind(model, tmp_path):
    """Puts the public step counter back."""
    model.optimizer.iterations.assign(0)


def restore_public_variables(model, tmp_path):
    """The snapshot idiom: put back what `optimizer.variables` showed."""
    fresh = runs.compiled(runs.counting_model(), runs.make_plan())
    fresh.optimizer.build(fresh.trainable_variables)
    for target, value in zip(model.optimizer.variables, fresh.optimizer.variables, strict=True):
        target.assign(value)


def restore_counter_only(model, tmp_path):
    """A TensorFlow checkpoint that names the counter but not the optimizer."""
    step = tf.Variable(np.int64(3))
    path = tf.train.Checkpoint(step=step).save(tmp_path / "step")
    target = tf.Variable(np.int64(0))
    tf.train.Checkpoint(step=target).restore(path)
    model.optimizer.iterations.assign(target)


def load_foreign_weights(model, tmp_path):
    """A file of another plan, with Keras told to skip what does not fit."""
    plan = runs.make_plan(noise_multiplier=2.0)
    other = runs.compiled(runs.counting_model(), plan)
    other.fit(plan.batches(*DATA), epochs=1, steps_per_epoch=3, verbose=0)
    other.save_weights(tmp_path / "other.weights.h5")
    with pytest.warns(UserWarning):
        model.load_weights(tmp_path / "other.weights.h5", skip_mismatch=True)


@pytest.mark.parametrize(
    "move", [rewind, restore_public_variables, restore_counter_only, load_foreign_weights]
)
def test_a_moved_step_counter_never_reuses_noise(move, tmp_path):
    """The same noise on two gradients would cancel."""
    model, plan = trained()
    move(model, tmp_path)
    with pytest.raises(ValueError, match="counter was changed|could not be restored"):
        model.fit(plan.batches(*DATA), epochs=2, verbose=0)


def test_an_interrupted_step_is_not_repeated(monkeypatch):
    """The noise of the step was drawn, its update was not made."""
    model, plan = trained(run_eagerly=True)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.optimizer.inner_optimizer, "apply", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.fit(plan.batches(*DATA), epochs=1, verbose=0)
    with pytest.raises(ValueError, match="interrupted"):
        model.fit(plan.batches(*DATA), epochs=1, verbose=0)


def test_a_rewound_counter_inside_a_compiled_step_gives_nan():
    model, plan = trained()
    noise = model.optimizer.run_state.noise
    zeros = [tf.zeros(shape) for shape in noise.layout.shapes]
    step = tf.function(noise.noisy_sums)
    assert np.isnan(step(zeros, tf.constant(3))[0].numpy()).all()


def test_compiling_again_with_the_same_optimizer_goes_on():
    model, plan = trained()
    model.compile(model.optimizer, loss=runs.prediction_loss)
    model.fit(plan.batches(*DATA), epochs=1, verbose=0)
    assert bandmf.statement(model).steps_run == 24


def test_a_restore_into_an_unbuilt_optimizer_blocks_fit(tmp_path):
    """Keras has loaded the weights by then, which hold private steps."""
    model, plan = trained()
    model.save_weights(tmp_path / "run.weights.h5")
    fresh = runs.compiled(runs.counting_model(), plan)
    with pytest.raises(ValueError, match="build"):
        fresh.load_weights(tmp_path / "run.weights.h5")
    with pytest.raises(ValueError, match="could not be restored"):
        fresh.fit(plan.batches(*DATA), epochs=1, verbose=0)
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(tmp_path / "run.weights.h5")
    fresh.fit(plan.batches(*DATA), epochs=1, verbose=0)
    assert bandmf.statement(fresh).steps_run == 24


def shuffled_dataset(plan):
    """A dataset in another order at each reading."""
    return plan.batches(tf.data.Dataset.from_tensor_slices(DATA).shuffle(96))


def permuted_arrays(plan):
    """The same rows under other numbers."""
    order = np.random.default_rng(1).permutation(96)
    return plan.batches(DATA[0][order], DATA[1][order])


def seeded(plan):
    """The same rows, sampled with another key."""
    return plan.batches(*DATA, seed=5)


@pytest.mark.parametrize("other", [shuffled_dataset, permuted_arrays, seeded])
def test_other_rows_order_or_key_in_a_later_fit_are_refused(other):
    """An example could take part in adjacent steps."""
    model, plan = trained()
    with pytest.raises(ValueError, match="order of the rows"):
        model.fit(other(plan), epochs=1, verbose=0)


def test_arrays_changed_in_place_between_fits_are_refused():
    plan = runs.make_plan()
    x, y = (part.copy() for part in DATA)
    model = runs.compiled(runs.counting_model(), plan)
    batches = plan.batches(x, y)
    model.fit(batches, epochs=1, verbose=0)
    np.random.default_rng(0).shuffle(x)
    with pytest.raises(ValueError, match="order of the rows"):
        model.fit(batches, epochs=1, verbose=0)


def test_the_order_of_the_rows_is_checked_after_a_restore(tmp_path):
    model, plan = trained()
    model.save_weights(tmp_path / "run.weights.h5")
    other = runs.compiled(runs.counting_model(), plan)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "run.weights.h5")
    with pytest.raises(ValueError, match="order of the rows"):
        other.fit(permuted_arrays(plan), epochs=1, verbose=0)
    other.fit(plan.batches(*DATA), epochs=1, verbose=0)


class StopAfter(keras.callbacks.Callback):
    """Stops training after a number of batches, for a reason nobody knows."""

    def __init__(self, batches):
        super().__init__()
        self._batches = batches

    def on_train_batch_end(self, batch, logs=None):
        """Stops."""
        if batch + 1 == self._batches:
            self.model.stop_training = True


def charged(callbacks=(), epochs=2, steps_per_epoch=None, fits=1, validation=False):
    """The steps charged after a seedless run."""
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan, seed=None)
    for _ in range(fits):
        model.fit(
            plan.batches(*DATA),
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            callbacks=list(callbacks),
            validation_data=DATA if validation else None,
            verbose=0,
        )
    return bandmf.statement(model)


def test_all_steps_are_charged_unless_fewer_were_fixed_in_advance(tmp_path):
    """Rule 9."""
    assert charged().steps_charged == 24
    assert charged(epochs=1, steps_per_epoch=5).steps_charged == 5
    assert charged([StopAfter(5)]).steps_charged == 24
    assert charged(epochs=1, steps_per_epoch=5, fits=2).steps_charged == 24
    saving = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras", monitor="val_loss", save_best_only=True
    )
    assert charged([saving, StopAfter(5)], validation=True).steps_charged == 24
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=1e9)
    statement = charged([stopping], epochs=20, steps_per_epoch=2, validation=True)
    assert statement.steps_run < statement.steps_charged == 24


def test_callbacks_of_the_user_are_named():
    statement = charged([StopAfter(5)])
    assert "StopAfter" in str(statement) and statement.private


@pytest.mark.parametrize("name", ["plan", "l2_norm_clip", "seed", "inner_optimizer", "replay"])
def test_what_the_noise_was_scaled_to_cannot_be_changed(name):
    model, _ = trained()
    with pytest.raises(AttributeError):
        setattr(model.optimizer, name, 100.0)


def test_an_optimizer_built_for_other_replicas_is_refused():
    """A replica that is not there would leave its part of the weights without noise."""
    plan = runs.make_plan()
    model = runs.compiled(runs.noise_model(), plan)
    with runs.mirrored().scope():
        model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="scope"):
        model.fit(plan.batches(*runs.noise_data()), verbose=0, epochs=1)
    with runs.mirrored().scope():
        mirrored = runs.compiled(runs.noise_model(), plan)
    mirrored.optimizer.build(mirrored.trainable_variables)
    with pytest.raises(ValueError, match="scope"):
        mirrored.fit(plan.batches(*runs.noise_data()), verbose=0, epochs=1)


def test_gradients_of_float64_weights_carry_no_digits_below_the_noise():
    """Finer digits than those of the float32 noise would show the gradient through it."""
    plan = runs.make_plan(
        sampling="fixed_order", max_participations=2, min_separation=12, num_bands=1
    )
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="float64")])
    model.layers[0].kernel.assign(np.zeros((3, 2)))
    optimizer = bandmf.BandMFOptimizer(keras.optimizers.SGD(8.0), plan)
    gradients = bandmf.clipped_gradients(
        model, np.full((8, 3), 1e-5), np.full((8, 2), 1e-5), loss="mse"
    )
    assert gradients.sums[0].dtype == tf.float64
    optimizer.apply_clipped(gradients, model.trainable_variables)
    change = model.layers[0].kernel.numpy()
    np.testing.assert_array_equal(change, change.astype(np.float32))


class Rollback(keras.callbacks.Callback):
    """Loads an earlier checkpoint at the end of an epoch."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def on_epoch_end(self, epoch, logs=None):
        """Goes back while Keras's iterator goes on."""
        self.model.load_weights(self._path)


def test_a_rollback_during_fit_is_an_error(tmp_path):
    model, plan = trained(steps=5)
    model.save_weights(tmp_path / "early.weights.h5")
    with pytest.raises(ValueError, match="changed during `fit`"):
        model.fit(
            plan.batches(*DATA),
            epochs=2,
            steps_per_epoch=4,
            callbacks=[Rollback(tmp_path / "early.weights.h5")],
            verbose=0,
        )


def test_a_step_on_other_data_during_fit_is_an_error():
    class Extra(keras.callbacks.Callback):
        """Trains on rows of its own."""

        def on_train_batch_end(self, batch, logs=None):
            """Calls the training step."""
            self.model.train_step((DATA[0][:8], DATA[1][:8]))

    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan)
    with pytest.raises(ValueError, match="batches of its plan"):
        model.fit(plan.batches(*DATA), callbacks=[Extra()], verbose=0, epochs=1)


def test_callbacks_in_nested_lists_are_checked():
    model, plan = trained()
    nested = keras.callbacks.CallbackList([keras.callbacks.EarlyStopping("loss")])
    for callbacks in (nested, [nested], [[keras.callbacks.EarlyStopping("loss")]]):
        with pytest.raises(ValueError, match="EarlyStopping"):
            model.fit(plan.batches(*DATA), callbacks=callbacks, verbose=0, epochs=1)


@pytest.mark.parametrize("name", ["compute_metrics", "make_train_function"])
def test_an_override_that_sees_raw_data_is_refused(name):
    """It could write raw data into a weight."""
    leaking = type("Leaking", (keras.Model,), {name: lambda self, *args, **options: {}})
    with pytest.raises(ValueError, match=name):
        bandmf.privatize(leaking())


class MixesOnDemand(keras.layers.Layer):
    """Lets examples see each other once `mixes` is set."""

    mixes = False

    def call(self, inputs):
        """Subtracts the mean over the batch, or nothing."""
        return inputs - keras.ops.mean(inputs, axis=0, keepdims=True) * float(self.mixes)


def test_a_model_changed_between_fits_is_checked_again():
    plan = runs.make_plan()
    layer = MixesOnDemand()
    model = keras.Sequential([keras.Input((96,)), keras.layers.Dense(2), layer])
    runs.compiled(bandmf.privatize(model), plan, loss="mse", run_eagerly=True)
    batches = plan.batches(DATA[0], np.zeros((96, 2), np.float32))
    model.fit(batches, steps_per_epoch=1, verbose=0, epochs=1)
    layer.mixes = True
    model.compile(model.optimizer, loss="mse")
    with pytest.raises(ValueError, match="example"):
        model.fit(batches, steps_per_epoch=1, verbose=0, epochs=1)


@pytest.mark.parametrize(
    "options", [{"steps_per_epoch": 3}, {"batch_size": 32}], ids=lambda options: list(options)[0]
)
def test_arrays_that_break_the_declared_separation_are_refused(options):
    plan = runs.make_plan(sampling="fixed_order", max_participations=2, min_separation=12)
    model = runs.compiled(runs.counting_model(), plan)
    with pytest.raises(ValueError, match=list(options)[0]):
        model.fit(*DATA, epochs=1, verbose=0, **options)


def test_arrays_too_short_for_the_declared_separation_are_refused():
    plan = runs.make_plan(sampling="fixed_order", max_participations=2, min_separation=12)
    model = runs.compiled(runs.counting_model(), plan)
    with pytest.raises(ValueError, match="steps apart"):
        model.fit(DATA[0][:40], DATA[1][:40], epochs=1, verbose=0)


def test_checkpoints_without_replay_hold_no_noise_key():
    """From the key alone, the noise of every released step could be computed."""
    model, _ = trained()
    arrays = model.optimizer.run_state.to_arrays(replay=False)
    key = model.optimizer.run_state.noise.get_key().tobytes()
    assert not [name for name, value in arrays.items() if key in value.tobytes()]
    replaying = model.optimizer.run_state.to_arrays(replay=True)
    assert replaying["noise_key"].tobytes() == key
