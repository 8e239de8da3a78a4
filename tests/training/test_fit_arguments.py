"""Data a private `fit` accepts: the model is checked on it, and declared orders are kept."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.training import fit_arguments
from tests import runs

X, Y = runs.counting_data()


def declared_plan():
    """A plan that leaves the data to the user."""
    return runs.make_plan(sampling="fixed_order", max_participations=2, min_separation=12)


class Rows(keras.utils.PyDataset):
    """The counting data in batches of eight."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        """Returns one batch."""
        return X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]


DATA = {
    "batches": lambda plan: (plan.batches(X, Y),),
    "arrays": lambda plan: (X, Y),
    "dataset": lambda plan: (tf.data.Dataset.from_tensor_slices((X, Y)).batch(8),),
    "pydataset": lambda plan: (Rows(),),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_model_that_mixes_examples_is_refused_whatever_the_data(kind):
    """Rule 6: by comparison on three rows, not only by the names of layers."""
    plan = runs.make_plan() if kind == "batches" else declared_plan()
    inputs = keras.Input((96,))
    hidden = keras.layers.Dense(2)(inputs)
    outputs = hidden - keras.ops.mean(hidden, axis=0, keepdims=True)
    model = runs.compiled(bandmf.privatize(keras.Model(inputs, outputs)), plan)
    with pytest.raises(ValueError, match="example"):
        model.fit(*DATA[kind](plan), verbose=0)


def test_a_generator_is_looked_at_and_gives_every_batch_after_that():
    batches = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
    rows, data = fit_arguments.first_rows((each for each in batches), None, None, 3)
    np.testing.assert_array_equal(rows["x"], X[:3])
    assert isinstance(data, types.GeneratorType)  # by which Keras knows it
    assert [id(each) for each in data] == [id(each) for each in batches]


@pytest.mark.parametrize("data", [(each for each in ()), iter([(X, Y)]), [1.0, 2.0]])
def test_data_that_cannot_be_looked_at_is_refused(data):
    with pytest.raises(ValueError, match="can be checked"):
        fit_arguments.first_rows(data, None, None, 3)


def test_first_rows_are_few_and_as_keras_passes_them():
    x = {"a": X.astype(np.float64)}
    rows, data = fit_arguments.first_rows(x, Y.astype(np.int64), None, 3)
    assert data is x
    assert rows["x"]["a"].shape == (3, 96) and rows["x"]["a"].dtype == np.float32
    assert rows["y"].dtype == np.int64 and rows["sample_weight"] is None


@pytest.mark.parametrize(("rows", "participations"), [(40, 5), (96, 1)], ids=["close", "many"])
def test_arrays_are_held_to_both_parts_of_the_declaration(rows, participations):
    plan = runs.make_plan(
        sampling="fixed_order", max_participations=participations, min_separation=12
    )
    with pytest.raises(ValueError, match="steps apart"):
        fit_arguments.check_foreign_data(X[:rows], plan, None, None)


def test_arrays_are_read_in_batches_of_the_plan():
    assert fit_arguments.check_foreign_data(X, declared_plan(), None, None) == (8, 12)
    dataset = tf.data.Dataset.from_tensor_slices(X)
    assert fit_arguments.check_foreign_data(dataset, declared_plan(), None, 5) == (None, None)


class StopAfterFive(keras.callbacks.Callback):
    """Stops in the middle of a pass."""

    def on_train_batch_end(self, batch, logs=None):
        """Stops."""
        self.model.stop_training = batch == 4


def test_arrays_do_not_start_again_after_an_unfinished_pass():
    """Row 0 would take part in steps 0 and 5, though twelve are declared to lie between."""
    model = runs.compiled(runs.counting_model(), declared_plan(), run_eagerly=True)
    model.fit(X, Y, callbacks=[StopAfterFive()], verbose=0, epochs=1)
    assert model.optimizer.steps_done == 5
    with pytest.raises(ValueError, match="first row"):
        model.fit(X, Y, verbose=0, epochs=1)
    assert model.optimizer.steps_done == 5


class _Centered(keras.layers.Layer):
    def call(self, inputs):
        return inputs - keras.ops.mean(inputs, axis=0, keepdims=True)


@pytest.mark.parametrize("mixes", [True, False])
def test_a_model_is_checked_on_a_generator(mixes):
    """Rule 6: whatever brings the data, no model is trained that mixes examples."""
    plan = runs.make_plan(sampling="fixed_order", max_participations=1, min_separation=24)
    layers = [keras.Input((3,)), *([_Centered()] if mixes else []), keras.layers.Dense(1)]
    model = runs.compiled(bandmf.privatize(keras.Sequential(layers)), plan, loss="mse")
    x = np.random.default_rng(0).normal(size=(24, 8, 3)).astype("float32")
    data = ((rows, rows[:, :1]) for rows in x)
    if mixes:
        with pytest.raises(ValueError, match="mixes examples"):
            model.fit(data, verbose=0, epochs=1)
        assert model.optimizer.steps_done == 0
    else:
        model.fit(data, verbose=0, epochs=1)
        assert model.optimizer.steps_done == 24


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((None, 0, 24, 12), 2),
        ((None, 0, 25, 12), 3),
        ((None, 3, 5, 12), 4),
        ((None, 1, 7, None), 2),
        ((5, 1, 48, 12), 5),
        ((9, 0, None, None), 9),
    ],
)
def test_epochs_are_those_asked_for_or_what_is_left(arguments, expected, caplog):
    assert fit_arguments.checked_epochs(*arguments) == expected
    assert not caplog.records


def test_epochs_that_leave_steps_are_named_once_in_the_log(caplog):
    assert fit_arguments.checked_epochs(1, 0, 24, 12) == 1
    assert [record.getMessage().split(" of ")[0] for record in caplog.records] == [
        "This `fit` leaves 12 steps"
    ]


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_a_fit_without_epochs_trains_what_is_left(options):
    plan = runs.make_plan()
    model = runs.compiled(runs.counting_model(), plan, seed=None, **options)
    batches = plan.batches(X, Y)
    model.fit(batches, epochs=1, steps_per_epoch=5, verbose=0)
    assert model.optimizer.steps_done == 5
    assert any("not used up" in caveat for caveat in bandmf.statement(model).caveats)
    model.fit(batches, verbose=0)
    assert model.optimizer.steps_done == plan.num_steps
    assert not any("not used up" in caveat for caveat in bandmf.statement(model).caveats)
    with pytest.raises(ValueError, match="24 steps"):
        model.fit(batches, verbose=0)


def test_arrays_in_a_declared_order_are_read_to_the_end_of_the_plan():
    plan = declared_plan()
    model = runs.compiled(runs.counting_model(), plan)
    model.fit(X, Y, verbose=0)
    assert model.optimizer.steps_done == plan.num_steps
