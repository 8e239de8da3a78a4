"""The first `fit` makes the plan of an optimizer with a target; later calls and files keep it."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.training import own_batches
from tests import runs
from tests.training.test_resume import through_checkpoint, through_keras_file, through_weights

X, Y = runs.counting_data()
TARGET = {"epsilon": 4.0, "delta": 1e-5, "num_bands": 3}


def plan_of(**changes):
    """The plan that a `fit` of two epochs in batches of eight makes."""
    numbers = {"num_examples": 96, "batch_size": 8, "epochs": 2}
    return bandmf.TrainingPlan.calibrate(**(numbers | TARGET | changes))


def model_of(replicas=1, seed=3, replay=False, inner=None, options=None, **target):
    """A model without a plan, compiled with SGD at learning rate one."""

    def make():
        model = runs.counting_model()
        optimizer = bandmf.BandMFOptimizer(
            inner or keras.optimizers.SGD(1.0), seed=seed, replay=replay, **(TARGET | target)
        )
        model.compile(optimizer, runs.prediction_loss, **(options or {}))
        return model

    return runs.in_scope(replicas, make)


def batches_of(model, x=X, y=Y, **options):
    """The batches that `fit` of a model trains on, which makes the plan, without training."""
    names = [field.name for field in dataclasses.fields(own_batches.Asked)]
    asked = dict.fromkeys(names) | {"x": x, "y": y, "initial_epoch": 0, "verbose": 0} | options
    return own_batches.batches_of_rows(own_batches.Asked(**asked), model, model.optimizer).batches


def compared(model):
    """The statement of a model without what says which run it is, and how the plan was made."""
    statement = bandmf.statement(model)
    caveats = [caveat for caveat in statement.caveats if "made in the first `fit`" not in caveat]
    return dataclasses.replace(statement, run_id=None, caveats=tuple(caveats))


@pytest.mark.parametrize(
    ("replicas", "options"),
    [(1, {}), (1, {"run_eagerly": True}), (1, {"jit_compile": True}), (2, {})],
    ids=str,
)
def test_it_is_the_run_of_the_explicit_plan(replicas, options):
    """Rule 7: same plan, same rows, same noise, same statement but for how the plan was made."""
    ours = model_of(replicas, options=options)
    updates = runs.fit(ours, X, y=Y, batch_size=8)
    assert ours.optimizer.plan == plan_of()
    theirs = runs.compiled_in_scope(replicas, runs.counting_model, plan_of(), **options)
    np.testing.assert_array_equal(updates, runs.fit(theirs, plan_of().batches(X, Y)))
    assert compared(ours) == compared(theirs)
    (caveat,) = set(bandmf.statement(ours).caveats) - set(bandmf.statement(theirs).caveats)
    assert "num_examples = 96" in caveat and "public" in caveat


@pytest.mark.parametrize(
    ("options", "target", "numbers"),
    [
        ({}, {}, {"batch_size": 32, "epochs": 1}),
        ({"batch_size": 16, "epochs": 3}, {}, {"batch_size": 16, "epochs": 3}),
        ({"epochs": 5, "initial_epoch": 3}, {}, {"batch_size": 32, "epochs": 2}),
        ({"epochs": 1}, {"epochs": 4}, {"batch_size": 32, "epochs": 4}),
        (
            {"epochs": 2, "steps_per_epoch": 2},
            {},
            {"batch_size": 32, "epochs": None, "num_steps": 4},
        ),
        ({"epochs": 2, "steps_per_epoch": 3}, {}, {"batch_size": 32, "epochs": 2}),
        (
            {"validation_split": 0.5, "batch_size": 8},
            {},
            {"num_examples": 48, "epochs": 1},
        ),
        ({"batch_size": np.int64(8)}, {"sampling": "fixed_order"}, {"epochs": 1}),
    ],
    ids=str,
)
def test_its_numbers_are_those_of_the_first_fit(options, target, numbers):
    model = model_of(**target)
    made = batches_of(model, **options)
    target = {name: value for name, value in target.items() if name != "epochs"}
    assert model.optimizer.plan == plan_of(**(target | numbers))
    assert made.plan_fingerprint == model.optimizer.plan.fingerprint


def test_noise_follows_the_momentum_of_the_inner_optimizer():
    model = model_of(inner=keras.optimizers.SGD(0.5, momentum=0.9))
    batches_of(model)
    assert model.optimizer.plan.workload.momentum == 0.9


def test_a_dataset_of_examples_is_counted():
    model = model_of()
    batches_of(model, tf.data.Dataset.from_tensor_slices((X, Y)), None, batch_size=24)
    assert model.optimizer.plan == plan_of(batch_size=24, epochs=1)


class Subclassed(keras.Model):
    """A model whose inputs are not known before it is built."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, inputs):
        """Returns one number a row."""
        return self.dense(inputs)


@pytest.mark.parametrize(
    "make",
    [Subclassed, lambda: keras.Sequential([keras.Input((96, 1)), keras.layers.Dense(1)])],
    ids=["unknown inputs", "other inputs"],
)
def test_a_dataset_that_may_be_one_of_batches_is_not_counted(make):
    model = bandmf.privatize(make())
    if model.built:
        data = tf.data.Dataset.from_tensor_slices((X[..., None], Y)).batch(8, True)
    else:
        data = tf.data.Dataset.from_tensor_slices((X, Y))
    model.compile(bandmf.BandMFOptimizer("sgd", **TARGET), loss="mse")
    with pytest.raises(ValueError, match="unbatch"):
        model.fit(data, batch_size=4, verbose=0)
    assert not model.optimizer.plan_of_run.known


def test_later_calls_go_on_with_the_plan_of_all_epochs(caplog):
    ours = model_of(epochs=2)
    parts = [
        runs.fit(ours, X, y=Y, epochs=1, batch_size=8),
        runs.fit(ours, ours.optimizer.plan.batches(X, Y), epochs=1, steps_per_epoch=3),
        runs.fit(ours, X, y=Y, epochs=None),
    ]
    theirs = runs.compiled(runs.counting_model(), plan_of())
    expected = runs.fit(theirs, plan_of().batches(X, Y))
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-6)
    with pytest.raises(bandmf.PrivacyError, match="24 steps and all of them.*`epochs` of all"):
        ours.fit(X, Y, verbose=0)


NUMBERS = {
    "rows": ({"x": X[:90], "y": Y[:90]}, "num_examples=96.*90 rows.*made by a first `fit`"),
    "batch_size": ({"batch_size": 32}, "plan's 8.*batch_size=32"),
    "epochs": ({"epochs": 3}, "24 steps that are left.*3 epochs, 36 steps"),
    "split": ({"validation_split": 0.5}, "num_examples=96.*leaves 48"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_later_calls_must_agree_with_the_plan(name):
    arguments, names = NUMBERS[name]
    model = model_of(epochs=2)
    batches_of(model, batch_size=8)
    with pytest.raises(ValueError, match=f"(?s){names}"):
        model.fit(**({"x": X, "y": Y, "verbose": 0} | arguments))
    assert not model.optimizer.built


FIRST = {
    "epochs": ({"epochs": 0}, "epochs"),
    "epochs before": ({"epochs": 3, "initial_epoch": 3}, "initial_epoch=3"),
    "epochs of text": ({"epochs": "3"}, "epochs"),
    "batch_size": ({"batch_size": 0}, "batch_size"),
    "half a row": ({"batch_size": 8.5}, "batch_size"),
    "large batches": ({"batch_size": 97}, "96.*batch_size=97"),
    "few rows": ({"x": X[:20], "y": Y[:20]}, "20.*batch_size=32 .the default of Keras"),
    "steps": ({"steps_per_epoch": 4}, "at most 3.*steps_per_epoch=4"),
    "no steps": ({"steps_per_epoch": 0}, "steps_per_epoch"),
}


@pytest.mark.parametrize("name", FIRST)
def test_numbers_of_which_no_plan_can_be_made_are_named(name):
    arguments, names = FIRST[name]
    model = model_of()
    with pytest.raises((TypeError, ValueError), match=names):
        model.fit(**({"x": X, "y": Y, "verbose": 0} | arguments))
    assert not model.optimizer.plan_of_run.known


def test_a_fit_that_fails_before_the_run_leaves_no_plan():
    """The next one may have another batch size."""
    model = model_of(options={"run_eagerly": True})
    for bad in ({"x": X[:, :5]}, {"callbacks": [keras.callbacks.TerminateOnNaN()]}):
        with pytest.raises(ValueError):
            model.fit(**({"x": X, "y": Y, "batch_size": 8, "verbose": 0} | bad))
        assert not model.optimizer.plan_of_run.known
    model.fit(X, Y, batch_size=24, verbose=0)
    assert model.optimizer.plan.batch_size == 24


def test_the_plan_is_shown_once_where_keras_shows_its_progress(capsys, caplog):
    caplog.set_level("INFO", "keras_bandmf")
    model = model_of(epochs=2, options={"run_eagerly": True})
    model.fit(X, Y, epochs=1, verbose=2)
    model.fit(X, Y, epochs=1, verbose=2)
    shown = capsys.readouterr().out
    assert shown.count(str(model.optimizer.plan)) == 1 and "made one for 96 rows" in shown
    assert "TrainingPlan" not in caplog.text


def test_the_plan_is_logged_where_keras_is_silent(capsys, caplog):
    caplog.set_level("INFO", "keras_bandmf")
    model_of(options={"run_eagerly": True}).fit(X, Y, verbose=0)
    assert capsys.readouterr().out == ""
    assert caplog.text.count("fingerprint") == 1


def built(*args, **kwargs):
    """A model whose optimizer waits for a plan."""
    model = model_of(*args, **kwargs)
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize(
    ("road", "inner"),
    [
        (through_weights, "sgd"),
        (through_checkpoint, "adam"),
        (through_keras_file, "adam"),
    ],
)
def test_a_restored_optimizer_has_the_plan_and_goes_on(road, inner, tmp_path):
    """Bit for bit with `replay`, in an optimizer that never saw the rows."""
    whole = model_of(replay=True, inner=inner)
    expected = runs.fit(whole, X, y=Y, batch_size=8)
    model = model_of(replay=True, inner=inner)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[StopAfter(9)])
    other = road(model, built(seed=5, replay=True, inner=inner), tmp_path)
    assert other.optimizer.plan == plan_of() and other.optimizer.steps_done == 9
    rest = runs.fit(other, X, y=Y, epochs=None)
    np.testing.assert_allclose(rest, expected[9:], atol=2e-6)
    statement = bandmf.statement(other)
    assert any("made in the first `fit`" in caveat for caveat in statement.caveats)
    assert not any("history unknown" in caveat for caveat in statement.caveats)
    assert statement.epsilon <= 4.0 and statement.steps_run == 24


class StopAfter(keras.callbacks.Callback):
    """Ends `fit` after some steps."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def on_train_batch_end(self, batch, logs=None):
        """Stops."""
        if self.model.optimizer.steps_done == self.steps:
            self.model.stop_training = True


def test_a_restored_optimizer_refuses_other_rows(tmp_path):
    """Rule 11."""
    model = model_of(epochs=2)
    model.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    other = through_weights(model, built(epochs=2), tmp_path)
    with pytest.raises(bandmf.PrivacyError, match="differ from those the run began with"):
        other.fit(X[::-1], Y, verbose=0)
    with pytest.raises(ValueError, match="num_examples=96"):
        other.fit(X[:90], Y[:90], verbose=0)


def test_a_restore_onto_two_replicas_goes_on(tmp_path):
    model = model_of(replay=True)
    expected = runs.fit(model_of(), X, y=Y, batch_size=8)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[StopAfter(9)])
    model.save_weights(tmp_path / "run.weights.h5")
    other = model_of(2, replay=True)
    with runs.mirrored().scope():
        other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "run.weights.h5")
    np.testing.assert_allclose(runs.fit(other, X, y=Y, epochs=None), expected[9:], atol=1e-5)


@pytest.mark.parametrize("kind", ["other target", "given plan"])
def test_a_checkpoint_of_another_target_is_refused_and_blocks_the_run(kind, tmp_path):
    """Rule 11: unknown means refused."""
    if kind == "given plan":
        model = runs.compiled(runs.counting_model(), plan_of())
        model.fit(plan_of().batches(X, Y), epochs=1, verbose=0)
    else:
        model = model_of(epsilon=8.0)
        model.fit(X, Y, batch_size=8, verbose=0)
    other = built()
    with pytest.raises(ValueError, match="same target"):
        through_weights(model, other, tmp_path)
    assert not other.optimizer.plan_of_run.known
    with pytest.raises(ValueError, match="could not be restored"):
        other.fit(X, Y, batch_size=8, verbose=0)


def test_the_plan_of_a_run_may_be_given_to_restore_it(tmp_path):
    """The caveat stays, also through a second file."""
    model = model_of(epochs=2)
    model.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        other = runs.compiled(runs.counting_model(), model.optimizer.plan)
        other.optimizer.build(other.trainable_variables)
        model = through_weights(model, other, tmp_path / str(number))
        caveats = bandmf.statement(model).caveats
        assert any("made in the first `fit`" in caveat for caveat in caveats)


def test_a_script_that_is_started_again_finishes_its_run(tmp_path):
    """BackupAndRestore: the first `fit` of the new process makes the same plan."""

    def script(callbacks):
        model = model_of(seed=None)
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", double_checkpoint=True)
        model.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=[backup, *callbacks])
        return model

    class Crash(keras.callbacks.Callback):
        """Fails in the second epoch."""

        def on_train_batch_end(self, batch, logs=None):
            """Raises."""
            if self.model.optimizer.steps_done == 17:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        script([Crash()])
    model = script([])
    assert model.optimizer.steps_done == 36
    assert bandmf.statement(model).epsilon <= 4.0
