"""The private step runs for the batches of a private fit, whoever holds the train function."""

import contextlib
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.training.private_training import private_training
from tests import runs

DATA = runs.counting_data()
ONE_BATCH = tf.data.Dataset.from_tensor_slices(DATA).batch(8).take(1)
MODES = [({}, 1), ({"run_eagerly": True}, 1), ({"jit_compile": True}, 1), ({}, 2)]


class TakesOut(keras.callbacks.Callback):
    """Keeps the train function that Keras is using."""

    def on_train_batch_end(self, batch, logs=None):
        """Takes it."""
        self.function = self.model.train_function


def call_train_function(model, taken):
    """The function of a finished fit."""
    model.train_function(iter(ONE_BATCH))


def call_what_was_taken_out(model, taken):
    """The function that a callback saw."""
    taken(iter(ONE_BATCH))


def call_keras_fit(model, taken):
    """Keras's own fit, on one batch."""
    keras.Model.fit(model, ONE_BATCH, verbose=0)


def call_keras_fit_after_compile(model, taken):
    """A new train function, traced anew."""
    model.compile(model.optimizer, loss=runs.prediction_loss)
    keras.Model.fit(model, ONE_BATCH, verbose=0)


def call_keras_train_on_batch(model, taken):
    """Keras's own single batch."""
    keras.Model.train_on_batch(model, *[part[:8] for part in DATA])


def call_keras_make_train_function(model, taken):
    """A function that Keras made, without the gate."""
    keras.Model.make_train_function(model, force=True)
    model.train_function(iter(ONE_BATCH))


def call_a_graph_of_the_step(model, taken):
    """A graph of the user around the step."""
    tf.function(model.train_step)(tuple(part[:8] for part in DATA))


CALLS = [
    call_train_function,
    call_what_was_taken_out,
    call_keras_fit,
    call_keras_fit_after_compile,
    call_keras_train_on_batch,
    call_keras_make_train_function,
    call_a_graph_of_the_step,
]
DECLARED = {"sampling": "fixed_order", "max_participations": 2, "min_separation": 12}


@pytest.mark.parametrize(("options", "replicas"), MODES)
def test_nothing_trains_after_a_private_fit_but_another_one(options, replicas):
    """The statement would stay the same."""
    plan = runs.make_plan()
    model = runs.compiled_in_scope(replicas, runs.counting_model, plan, **options)
    taken = TakesOut()
    model.fit(plan.batches(*DATA), steps_per_epoch=1, callbacks=[taken], verbose=0, epochs=1)
    before, steps = model.get_weights()[0], bandmf.statement(model).steps_run
    calls = CALLS if replicas == 1 and not options else CALLS[:3]
    for call in calls:
        with pytest.raises(ValueError, match="not accounted"):
            call(model, taken.function)
        np.testing.assert_array_equal(model.get_weights()[0], before)
    assert bandmf.statement(model).steps_run == steps
    model.compile(model.optimizer, loss=runs.prediction_loss, **options)
    model.fit(plan.batches(*DATA), steps_per_epoch=1, verbose=0, epochs=1)
    assert bandmf.statement(model).steps_run == steps + 1


def test_a_declaration_of_participations_opens_no_gate():
    """Such data too is counted by `fit`."""
    plan = runs.make_plan(**DECLARED)
    model = runs.compiled(runs.counting_model(), plan)
    model.fit(*DATA, epochs=1, verbose=0)
    for call in CALLS:
        with pytest.raises(ValueError, match="not accounted"):
            call(model, model.train_function)


@pytest.mark.parametrize("hook", ["on_train_batch_begin", "on_train_batch_end", "on_epoch_end"])
def test_a_callback_cannot_train_during_fit(hook):
    """Keras has the one call of each batch."""
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan)
    callback = keras.callbacks.Callback()
    setattr(callback, hook, lambda *args, **logs: call_keras_fit(model, None))
    with pytest.raises(ValueError, match="not accounted"):
        model.fit(plan.batches(*DATA), steps_per_epoch=2, callbacks=[callback], verbose=0, epochs=1)


def test_an_input_called_mask_is_not_taken_for_the_mask_of_a_batch(monkeypatch):
    """A dict of the user's own data, without targets, has the keys of a plan's batch."""
    model = runs.compiled(runs.counting_model(), runs.make_plan(**DECLARED))
    training = private_training(model)
    seen = []
    monkeypatch.setattr(training, "_clip", lambda *parts: seen.append(parts) or 1 / 0)
    data = {"x": DATA[0][:8], "mask": DATA[0][:8]}
    with training._gate.during_fit(model.optimizer, "own data"):
        training._gate.on_train_batch_begin(0)
        with pytest.raises(ZeroDivisionError):
            training._gate.guarded(model.train_step)(data)
    assert seen[0][0] is data and seen[0][3] is None


@pytest.mark.parametrize("way", ["fit", "restore"])
def test_no_step_is_made_on_a_batch_drawn_before_the_run_moved(way, tmp_path):
    """A callback trains or restores between the draw of a batch and its step."""
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan, seed=None)
    batches = plan.batches(*DATA)
    model.fit(batches, steps_per_epoch=1, verbose=0, epochs=1)
    model.save_weights(tmp_path / "one.weights.h5")
    left = []

    def move(batch, logs=None):
        if batch == 2:
            if way == "restore":
                model.load_weights(tmp_path / "one.weights.h5")
            left.append(model.get_weights()[0])
            if way == "fit":
                model.fit(batches, steps_per_epoch=1, verbose=0, epochs=1)

    callback = keras.callbacks.LambdaCallback(on_train_batch_begin=move)
    with pytest.raises(ValueError, match="being trained|changed during `fit`"):
        model.fit(batches, steps_per_epoch=4, callbacks=[callback], verbose=0, epochs=1)
    np.testing.assert_array_equal(model.get_weights()[0], left[0])


def test_another_thread_neither_fits_nor_applies_during_a_fit():
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan, run_eagerly=True)
    rows = [part[:8] for part in DATA]
    errors = []

    def attack():
        gradients = bandmf.clipped_gradients(model, *rows)
        for call in (
            lambda: model.fit(plan.batches(*DATA), steps_per_epoch=1, verbose=0, epochs=1),
            lambda: model.optimizer.apply_clipped(gradients, model.trainable_variables),
        ):
            try:
                call()
            except ValueError as error:
                errors.append(str(error))

    class Metric(keras.metrics.Mean):
        """Is called in the middle of a step."""

        def update_state(self, *args, **kwargs):
            """Starts a thread and waits for it."""
            if tf.executing_eagerly() and model.optimizer._data_source and not errors:
                thread = threading.Thread(target=attack)
                thread.start()
                thread.join()

    model.compile(model.optimizer, loss=runs.prediction_loss, metrics=[Metric()], run_eagerly=True)
    model.fit(plan.batches(*DATA), steps_per_epoch=1, verbose=0, epochs=1)
    assert len(errors) == 2
    assert "being trained" in errors[0] and "not accounted" in errors[1]
    assert bandmf.statement(model).steps_run == 1


def test_a_loop_takes_no_gradients_of_another_model():
    """They would carry what that model learned."""
    plan = runs.make_plan(**DECLARED)
    model, other = (runs.compiled(runs.counting_model(), plan) for _ in range(2))
    gradients = bandmf.clipped_gradients(other, *[part[:8] for part in DATA])
    with pytest.raises(ValueError, match="at their values"):
        model.optimizer.apply_clipped(gradients, model.trainable_variables)
    assert not model.get_weights()[0].any()


class SwitchesTensorFloatOn(keras.callbacks.Callback):
    """As a user may for a validation, say after the second step."""

    def on_train_batch_end(self, batch, logs=None):
        """Does it once."""
        if batch == 1:
            tf.config.experimental.enable_tensor_float_32_execution(True)


@pytest.mark.parametrize(("options", "replicas"), MODES)
@pytest.mark.parametrize("when", ["between fits", "between steps"])
def test_tensor_float_that_is_switched_on_later_is_refused(monkeypatch, options, replicas, when):
    """Kernels read the switch when they run: nothing is traced again, and products are short."""
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    plan = runs.make_plan()
    model = runs.compiled_in_scope(replicas, runs.counting_model, plan, **options)
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: [gpu])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: {})
    callbacks = [SwitchesTensorFloatOn()] if when == "between steps" else []
    done = 2 if callbacks else 12
    try:
        with contextlib.ExitStack() as stack:
            if callbacks:
                stack.enter_context(pytest.raises(ValueError, match="TensorFloat-32"))
            model.fit(plan.batches(*DATA), epochs=1, verbose=0, callbacks=callbacks)
        assert model.optimizer.steps_done == done
        weights = model.get_weights()
        tf.config.experimental.enable_tensor_float_32_execution(True)
        with pytest.raises(ValueError, match="TensorFloat-32"):
            model.fit(plan.batches(*DATA), epochs=1, verbose=0)
        assert model.optimizer.steps_done == done
        np.testing.assert_array_equal(model.get_weights()[0], weights[0])
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(False)
    model.fit(plan.batches(*DATA), verbose=0)
    assert model.optimizer.steps_done == 24
