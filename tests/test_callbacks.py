"""The callbacks of a private fit."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.training import callback_policy
from tests import runs


def test_epsilon_so_far_is_in_the_history_and_grows_to_the_plans():
    plan = runs.make_plan(num_steps=24)
    model = runs.compiled(runs.counting_model(), plan)
    history = model.fit(
        plan.batches(*runs.counting_data()),
        epochs=2,
        callbacks=[bandmf.callbacks.EpsilonSoFar()],
        verbose=0,
    )
    first, last = history.history["epsilon"]
    assert plan.epsilon(12) <= first <= plan.epsilon(12) + 1e-4
    assert first < plan.epsilon() <= last <= plan.epsilon() + 1e-4


class Seen(keras.callbacks.Callback):
    """Keeps what is in the logs when its turn comes."""

    def on_epoch_end(self, epoch, logs=None):
        self.names = set(logs)


@pytest.mark.parametrize("nested", [False, True])
def test_epsilon_is_in_the_logs_of_callbacks_that_stand_before_it(nested):
    plan = runs.make_plan(num_steps=12)
    model = runs.compiled(runs.counting_model(), plan)
    seen = Seen()
    callbacks = [seen, bandmf.callbacks.EpsilonSoFar()]
    callbacks = [[callbacks]] if nested else callbacks
    model.fit(plan.batches(*runs.counting_data()), callbacks=callbacks, verbose=0)
    assert "epsilon" in seen.names


def scalars(folder):
    """The tags and values in the event files of a folder."""
    found = {}
    for file in folder.rglob("events.*"):
        for record in tf.data.TFRecordDataset(str(file)):
            for value in tf.compat.v1.Event.FromString(record.numpy()).summary.value:
                found.setdefault(value.tag, []).append(tf.make_ndarray(value.tensor))
    return found


@pytest.mark.parametrize("asked", [False, True])
def test_tensorboard_shows_epsilon(asked, tmp_path):
    pytest.importorskip("tensorboard")
    plan = runs.make_plan(num_steps=24)
    model = runs.compiled(runs.counting_model(), plan)
    callbacks = [keras.callbacks.TensorBoard(tmp_path)]
    if asked:
        callbacks.append(bandmf.callbacks.EpsilonSoFar())
    history = model.fit(
        plan.batches(*runs.counting_data()), epochs=2, callbacks=callbacks, verbose=0
    )
    shown = scalars(tmp_path)["epoch_epsilon"]
    np.testing.assert_allclose(shown, history.history["epsilon"], rtol=1e-6)
    assert len(shown) == 2
    assert callback_policy.unknown_callbacks(callbacks) == []


def test_stop_at_epsilon_stays_within_the_target_and_the_run_is_charged_in_full():
    plan = runs.make_plan(num_steps=24)
    model = runs.compiled(runs.counting_model(), plan)
    stop = bandmf.callbacks.StopAtEpsilon((plan.epsilon(16) + plan.epsilon(24)) / 2)
    rows = plan.batches(*runs.counting_data())
    history = model.fit(rows, epochs=3, steps_per_epoch=8, callbacks=[stop], verbose=0)
    assert len(history.epoch) == 2 and model.optimizer.steps_done == 16
    assert callback_policy.unknown_callbacks([stop]) == []
    assert bandmf.statement(model).epsilon >= plan.epsilon()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), "1", None])
def test_stop_at_epsilon_refuses_what_is_no_target(bad):
    with pytest.raises((TypeError, ValueError), match="epsilon"):
        bandmf.callbacks.StopAtEpsilon(bad)


def test_callbacks_on_validation_metrics_are_allowed_and_named():
    allowed = [
        keras.callbacks.EarlyStopping("val_loss"),
        keras.callbacks.ModelCheckpoint("x.keras"),
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.1),
    ]
    assert callback_policy.check_callbacks(allowed) == ["EarlyStopping(val_loss)"]
    assert callback_policy.unknown_callbacks(allowed) == []
    first, second = callback_policy.remarks(allowed, ["EarlyStopping(val_loss)"])
    assert "validation data" in first and "function of the epoch alone" in second


@pytest.mark.parametrize(
    ("given", "count"), [(None, 0), ([], 0), (keras.callbacks.History(), 1), ([[[None]]], 0)]
)
def test_callbacks_are_found_in_nested_lists(given, count):
    assert len(callback_policy.flat_callbacks(given)) == count


def test_a_callback_of_a_known_class_by_inheritance_is_checked_and_named():
    class Mine(keras.callbacks.EarlyStopping):
        """Acts like its parent."""

    with pytest.raises(ValueError, match="Mine"):
        callback_policy.check_callbacks([Mine("loss")])
    assert callback_policy.unknown_callbacks([Mine("val_loss")]) == ["Mine"]


DECLARED = {"sampling": "fixed_order", "max_participations": 2, "min_separation": 12}


@pytest.mark.parametrize(
    ("declared", "message"), [({}, "not accounted"), (DECLARED, "changed during `fit`")]
)
def test_a_step_at_the_end_of_training_is_an_error(declared, message):
    class End(keras.callbacks.Callback):
        """Trains on rows of its own when all epochs are over."""

        def on_train_end(self, logs=None):
            """Makes a step that no batch accounts for."""
            rows = [part[:8] for part in runs.counting_data()]
            gradients = bandmf.clipped_gradients(self.model, *rows)
            self.model.optimizer.apply_clipped(gradients, self.model.trainable_variables)

    plan = runs.make_plan(**declared)
    model = runs.compiled(runs.counting_model(), plan, run_eagerly=True)
    with pytest.raises(ValueError, match=message):
        model.fit(
            plan.batches(*runs.counting_data()),
            steps_per_epoch=1,
            callbacks=[End()],
            verbose=0,
            epochs=1,
        )


HOOKS = ("on_epoch_begin", "on_train_batch_end", "on_epoch_end", "on_train_end")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("whole", [False, True])
def test_a_moved_position_is_seen_at_every_hook(hook, whole):
    """Counter and noise restored together, or the counter alone."""
    model = runs.compiled(runs.counting_model(), runs.make_plan())
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    guard = callback_policy.StepGuard(optimizer, None)
    guard.set_model(model)
    guard.on_epoch_begin(0)
    optimizer.iterations.assign(2)
    if whole:
        optimizer.run_state.noise.position = 2
    with pytest.raises(ValueError, match="changed during `fit`|counter was changed"):
        getattr(guard, hook)(*([] if hook == "on_train_end" else [0]))


def test_a_counter_moved_before_the_first_epoch_is_seen():
    """As by a callback that restores at the beginning of training."""
    model = runs.compiled(runs.counting_model(), runs.make_plan())
    model.optimizer.build(model.trainable_variables)
    guard = callback_policy.StepGuard(model.optimizer, None)
    guard.set_model(model)
    model.optimizer.iterations.assign(2)
    with pytest.raises(ValueError, match="counter was changed"):
        guard.on_epoch_begin(0)


@pytest.mark.parametrize("sampling", ["cyclic_poisson", "fixed_order"])
def test_every_step_of_every_fit_has_the_examples_of_its_own_number(sampling):
    """Batches begin at the optimizer's step, at each epoch and each call of `fit`."""
    plan = runs.make_plan(noise_multiplier=1e-3, num_steps=36, sampling=sampling)
    model = runs.compiled(runs.counting_model(), plan)
    batches = plan.batches(*runs.counting_data())
    updates = [runs.fit(model, batches, epochs=1, steps_per_epoch=5)]
    updates += [runs.fit(model, batches, epochs=2, steps_per_epoch=7)]
    taken = np.concatenate(updates) * plan.batch_size > 0.5
    assert len(taken) == 19
    for step, row in enumerate(taken):
        assert sorted(np.flatnonzero(row)) == sorted(batches.indices(step))


@pytest.mark.parametrize("seed", [None, 5])
def test_batches_of_a_fixed_seed_are_remembered_by_the_run(seed):
    """Rule 10: with known batches the sampling amplifies nothing, though the noise is secret."""
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan, seed=None)
    model.optimizer.build(model.trainable_variables)
    guard = callback_policy.StepGuard(
        model.optimizer, plan.batches(*runs.counting_data(), seed=seed)
    )
    guard.set_model(model)
    guard.on_epoch_begin(0)
    assert model.optimizer.run_state.seeded == (seed is not None)


def test_without_validation_data_no_callback_may_act_on_a_validation_metric():
    model = runs.compiled(runs.counting_model(), runs.make_plan())
    batches = model.optimizer.plan.batches(*runs.counting_data())
    with pytest.raises(ValueError, match="validation_data"):
        model.fit(
            batches, callbacks=[keras.callbacks.EarlyStopping("val_loss")], verbose=0, epochs=1
        )


@keras.saving.register_keras_serializable(package="keras_bandmf_tests")
class Several(keras.metrics.MeanSquaredError):
    """A metric whose result has names of its own."""

    def result(self):
        """One of validation, as it seems."""
        return {"val_inner": super().result()}


@pytest.mark.parametrize("way", ["metric", "result", "output"])
def test_training_metrics_must_not_pass_for_validation_metrics(way):
    plan, (x, y) = runs.make_plan(), runs.counting_data()
    if way == "output":
        inputs = keras.Input((96,))
        names = ("val_out", "other")
        outputs = {name: keras.layers.Dense(1, name=name)(inputs) for name in names}
        model = bandmf.privatize(keras.Model(inputs, outputs))
        runs.compiled(model, plan, loss=dict.fromkeys(names, "mse"))
        y = dict.fromkeys(names, y)
    else:
        metric = keras.metrics.MeanSquaredError(name="val_mse") if way == "metric" else Several()
        model = runs.compiled(runs.counting_model(), plan, metrics=[metric])
    before = model.get_weights()[0]
    with pytest.raises(ValueError, match="must not begin with 'val_'"):
        model.fit(plan.batches(x, y), verbose=0, epochs=1)
    np.testing.assert_array_equal(model.get_weights()[0], before)


def test_a_step_that_was_made_on_rows_of_another_one_is_not_private():
    model = runs.compiled(runs.counting_model(), runs.make_plan(), seed=None)
    model.fit(
        model.optimizer.plan.batches(*runs.counting_data()), steps_per_epoch=1, verbose=0, epochs=1
    )
    optimizer = model.optimizer
    assert bandmf.statement(model).private
    guard = callback_policy.StepGuard(optimizer, None)
    guard.set_model(model)
    guard.on_epoch_begin(0)
    optimizer.iterations.assign(5)
    with pytest.raises(ValueError, match="changed during `fit`"):
        guard.on_train_batch_end(0)
    assert not bandmf.statement(model).private


def of_keras_tuner(objective):
    """What KerasTuner adds to a trial; `tests/test_keras_tuner.py` has the real ones."""
    kind = type("SaveBestEpoch", (keras.callbacks.Callback,), {"__module__": "keras_tuner.src"})
    callback = kind()
    callback.objective = types.SimpleNamespace(name=objective)
    return callback


def test_trials_of_keras_tuner_need_a_ledger_and_public_metrics(tmp_path):
    ledger = bandmf.callbacks.PrivacyLedger(tmp_path)
    check = callback_policy.check_callbacks
    with pytest.raises(bandmf.PrivacyError, match=r"search without.*callbacks=\[ledger\]"):
        check([of_keras_tuner("val_loss")])
    with pytest.raises(bandmf.PrivacyError, match="Received: objective='loss'"):
        check([of_keras_tuner("loss"), ledger])
    with pytest.raises(ValueError, match="Received: validation_data=None"):
        check([of_keras_tuner("val_loss"), ledger], validates=False)
    assert check([of_keras_tuner("val_loss"), ledger]) == ["KerasTuner(val_loss)"]
    assert check([ledger], validates=False) == []
    returned = [of_keras_tuner("default_objective"), ledger]
    assert check(returned, validates=False) == []
    assert any("code of the user" in remark for remark in callback_policy.remarks(returned, []))


def test_the_tuner_of_a_user_is_named_in_the_statement(tmp_path):
    own, users = of_keras_tuner("val_loss"), of_keras_tuner("val_loss")
    users.tuner = types.SimpleNamespace()
    assert callback_policy.unknown_callbacks([own]) == []
    assert callback_policy.unknown_callbacks([users]) == ["SaveBestEpoch"]
