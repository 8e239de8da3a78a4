"""Validation data is tried before the first step: what cannot be evaluated costs no step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bandmf as bandmf
from keras_bandmf.training import validation
from tests import runs

PLAN = runs.make_plan(num_examples=16, batch_size=4, num_steps=8, num_bands=2)
X, Y = np.ones((16, 3), np.float32), np.arange(16) % 2
ROWS = PLAN.batches(X, Y)


class Random(keras.layers.Layer):
    """Draws a number in each call, in evaluation, too."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, inputs):
        return inputs + 0.0 * keras.random.normal(keras.ops.shape(inputs), seed=self.seeds)


def model_of(layers=(), **options):
    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    options.setdefault("metrics", ["accuracy"])
    return runs.compiled(bandmf.privatize(model), PLAN, loss=loss, **options)


def dataset(*columns):
    return tf.data.Dataset.from_tensor_slices(columns).batch(4)


class Pairs(keras.utils.PyDataset):
    """Two batches."""

    def __init__(self, width=3):
        super().__init__()
        self.width = width

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return np.ones((4, self.width), np.float32), Y[:4]


BAD = {
    "wrong width": (lambda: (np.ones((4, 5)), Y[:4]), r"float64\[4, 5\]"),
    "wrong width of a dataset": (lambda: dataset(np.ones((4, 5)), Y[:4]), "expected"),
    "wrong width of a PyDataset": (lambda: Pairs(5), "expected"),
    "wrong width of a generator": (lambda: (Pairs(5)[i] for i in range(2)), "expected"),
    "empty generator": (lambda: (each for each in ()), "at its end"),
    "strings": (lambda: (np.array(["a"] * 4), Y[:4]), "Unrecognized|dtype|strings"),
    "strings of a dataset": (lambda: dataset(np.array(["a"] * 4), Y[:4]), "strings"),
    "targets of strings": (lambda: dataset(X[:4], np.array(["a"] * 4)), "holds strings"),
    "two targets": (lambda: (X, (Y, Y)), "different structures"),
    "targets of another rank": (lambda: (X, np.ones((16, 2, 5))), "target.shape"),
    "no targets": (lambda: (X,), r"no targets: pass `\(x, y\)`"),
    "only an array": (lambda: X, r"no targets"),
    "other numbers of rows": (lambda: (X, Y[:4]), "cardinality|same number"),
    "a word": (lambda: "words", "of type str"),
    "a number": (lambda: 3, "of type int"),
    "batches of the plan": (lambda: ROWS, r"cannot be what `plan.batches` returns"),
    "a pair with batches": (lambda: (ROWS, None), r"cannot be what `plan.batches` returns"),
    "four columns": (lambda: (X, Y, Y, Y), "x, y"),
}


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"run_eagerly": True}, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_evaluated_costs_no_step(name, options):
    make, match = BAD[name]
    model = model_of(**options)
    before = [np.array(value) for value in model.get_weights()]
    with pytest.raises(ValueError, match=match) as caught:
        model.fit(ROWS, epochs=1, validation_data=make(), verbose=0)
    assert "`validation_data`" in str(caught.value) and "Received: " in str(caught.value)
    np.testing.assert_equal(model.get_weights(), before)
    assert not model.optimizer.built or model.optimizer.steps_done == 0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"validation_freq": 0}, ValueError, "`validation_freq`.*Received"),
        ({"validation_freq": 1.5}, TypeError, "`validation_freq`.*Received"),
        ({"validation_freq": True}, TypeError, "`validation_freq`.*Received"),
        ({"validation_freq": "epoch"}, TypeError, "`validation_freq`.*Received"),
        ({"validation_freq": [1, "b"]}, TypeError, "`validation_freq`.*Received"),
        ({"validation_steps": 0}, ValueError, "`validation_steps`.*Received"),
        ({"validation_steps": "all"}, TypeError, "`validation_steps`.*Received"),
        ({"validation_batch_size": -1}, ValueError, "`validation_batch_size`.*Received"),
        ({"validation_batch_size": 2.0}, TypeError, "`validation_batch_size`.*Received"),
    ],
    ids=str,
)
def test_numbers_at_which_keras_fails_after_an_epoch(arguments, error, match):
    model = model_of()
    with pytest.raises(error, match=match):
        model.fit(ROWS, epochs=1, validation_data=(X, Y), verbose=0, **arguments)
    assert not model.optimizer.built


@pytest.mark.parametrize("frequency", [(2,), {2}, np.int64(2), [2]], ids=str)
def test_frequencies_that_keras_alone_would_refuse_after_an_epoch(frequency):
    model = model_of()
    history = model.fit(
        PLAN.batches(X, Y), validation_data=(X, Y), validation_freq=frequency, verbose=0
    )
    assert len(history.history["loss"]) == 2 and len(history.history["val_loss"]) == 1


GOOD = {
    "arrays": lambda: (X, Y),
    "a list": lambda: [X, Y],
    "weights": lambda: (X, Y, np.ones(16)),
    "a dataset": lambda: dataset(X, Y),
    "a PyDataset": lambda: Pairs(),
    "a generator": lambda: (Pairs()[i] for i in range(4)),
}


@pytest.mark.parametrize("name", GOOD)
def test_trying_it_changes_neither_data_nor_model(name):
    """Metrics, seeds and the batches of a generator are those that Keras finds."""
    model = model_of([Random()])
    model.fit(PLAN.batches(X, Y), epochs=1, verbose=0)
    variables = [*model.variables, *(v for m in model.metrics for v in m.variables)]
    before = [np.array(variable) for variable in variables]
    seeds = np.array(model.layers[0].seeds.state)
    data = validation.evaluable(model, GOOD[name](), 4, None)
    np.testing.assert_equal([np.array(variable) for variable in variables], before)
    np.testing.assert_equal(np.array(model.layers[0].seeds.state), seeds)
    if name == "a generator":
        assert len(list(data)) == 4


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_a_run_is_the_same_with_validation(options):
    found = []
    for more in ({}, {"validation_data": (X, Y)}):
        model = model_of(**options)
        model.fit(PLAN.batches(X, Y), epochs=2, verbose=0, **more)
        found.append(model.get_weights())
    np.testing.assert_equal(*found)


def test_replicas_validate():
    model = runs.in_scope(2, model_of)
    model.fit(PLAN.batches(X, Y), epochs=1, validation_data=(X, Y), verbose=0)
    assert np.isfinite(model.history.history["val_loss"]).all()
    model = runs.in_scope(2, model_of)
    with pytest.raises(ValueError, match="before the first step"):
        model.fit(PLAN.batches(X, Y), epochs=1, validation_data=(X[:, :2], Y), verbose=0)
    assert model.optimizer.steps_done == 0


class OwnEvaluation(keras.Sequential):
    """Evaluates whatever it is given."""

    def evaluate(self, *args, **kwargs):
        return {"loss": 1.0}


def test_an_evaluation_of_the_users_own_is_not_tried():
    model = OwnEvaluation([keras.Input((3,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    runs.compiled(bandmf.privatize(model), PLAN, loss=loss)
    model.fit(PLAN.batches(X, Y), epochs=1, validation_data=(X[:, :1], Y), verbose=0)
    assert model.history.history["val_loss"] == [1.0]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_regularizers_of_weights_are_evaluated_as_in_keras(replicas, options):
    if replicas == 2 and options:
        pytest.skip("one way of running is enough there")

    def make():
        keras.utils.set_random_seed(7)
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(1))]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return runs.compiled(bandmf.privatize(model), PLAN, loss=loss, **options)

    model = runs.in_scope(replicas, make)
    history = model.fit(ROWS, epochs=1, verbose=0, validation_data=(X[:4], Y[:4])).history
    expected = model.evaluate(X[:4], Y[:4], verbose=0)
    np.testing.assert_allclose(history["val_loss"][-1], expected, rtol=1e-5)
