"""Losses of Keras that are computed on all rows at once: which ones, and that rows stay apart."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.clipping import row_losses
from keras_bandmf.clipping.losses import batch_loss
from keras_bandmf.clipping.row_losses import per_example_losses
from tests.clipping.test_losses import LOSSES, ROWS, data, same_as_alone

L = keras.losses
KNOWN = [
    *("mse", "mse flat", "mse sum", "mse none", "mae", "mape", "msle", "huber", "logcosh", "kl"),
    *("poisson", "bce", "bce logits", "cce", "sparse", "name"),
]


class Doubled(L.MeanSquaredError):
    def call(self, y_true, y_pred):
        return 2.0 * super().call(y_true, y_pred)


@pytest.fixture
def vectorizes(monkeypatch):
    """The calls of the path that takes one row at a time."""
    calls = []
    vectorized = row_losses.vectorized

    def counted(function, rows):
        calls.append(rows)
        return vectorized(function, rows)

    monkeypatch.setattr(row_losses, "vectorized", counted)
    return calls


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_known(name, vectorizes):
    loss, kind = LOSSES[name]
    y, y_pred = map(tf.constant, data(kind))
    per_example_losses(batch_loss(keras.Model(), loss), y, y_pred, None)
    assert bool(vectorizes) == (name not in KNOWN)


@pytest.mark.parametrize("name", ["mse", "mse sum", "mse flat", "mae", "bce", "sparse"])
@pytest.mark.parametrize("weight", [np.linspace(0, 3, ROWS), np.arange(ROWS)])
def test_weights_of_rows(name, weight, vectorizes):
    loss, kind = LOSSES[name]
    same_as_alone(loss, *data(kind), weight.astype("float32"))
    assert not vectorizes


def test_weights_of_places_and_classes_of_places(vectorizes):
    loss = L.SparseCategoricalCrossentropy(from_logits=True)
    y, y_pred = data("steps")
    weight = np.linspace(0.2, 2, ROWS * 3).reshape(ROWS, 3).astype("float32")
    same_as_alone(loss, y, y_pred, weight)
    same_as_alone(loss, y[..., None], y_pred, weight)
    same_as_alone(loss, y, y_pred, weight[:, 0])
    assert not vectorizes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_outputs_of_another_dtype(dtype):
    y, y_pred = data("regression")
    y_pred = tf.cast(y_pred, dtype)
    compute = batch_loss(keras.Model(), "mse")
    losses, outputs, (slopes,) = per_example_losses(compute, tf.constant(y), y_pred, None)
    assert losses.dtype == tf.float32 and slopes.dtype == y_pred.dtype and outputs[0] is y_pred


@pytest.mark.parametrize(
    "loss, kind",
    [
        (Doubled(), "regression"),
        (L.CategoricalCrossentropy(axis=1), "classes"),
        (L.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2), "steps"),
        (L.MeanSquaredError(reduction="mean_with_sample_weight"), "regression"),
        (L.Huber(delta=tf.Variable(1.0)), "regression"),
    ],
    ids=["subclass", "axis", "ignored class", "reduction", "variable"],
)
def test_other_kinds_take_one_row_at_a_time(loss, kind, vectorizes):
    y, y_pred = map(tf.constant, data(kind))
    per_example_losses(batch_loss(keras.Model(), loss), y, y_pred, None)
    assert vectorizes


def test_an_instance_that_is_changed_takes_one_row_at_a_time(vectorizes):
    loss = L.MeanSquaredError()
    loss.call = lambda y_true, y_pred: tf.reduce_sum(y_pred)[None]
    y, y_pred = map(tf.constant, data("regression"))
    per_example_losses(batch_loss(keras.Model(), loss), y, y_pred, None)
    assert vectorizes


def test_shapes_that_broadcast_take_one_row_at_a_time(vectorizes):
    """With as many rows as classes, targets of the rows would be compared with those of classes."""
    y, y_pred = tf.ones([4]), tf.random.normal([4, 4])
    losses = per_example_losses(batch_loss(keras.Model(), "mse"), y, y_pred, None).losses
    assert vectorizes
    np.testing.assert_allclose(losses, np.mean((y_pred - 1) ** 2, axis=1), rtol=1e-5)


@pytest.mark.parametrize("rows", [(1, 4, 4), (4, 1, 4), (4, 4, 1)])
@pytest.mark.parametrize("kind", ["eager", "graph", "jit", "dynamic", "dynamic jit"])
def test_one_row_is_not_broadcast_to_the_others(kind, rows):
    """Outputs of one row, from a model that mixes rows, would get the slopes of all examples."""
    compute = batch_loss(keras.Model(), "mse")
    y, y_pred, weight = tf.zeros((rows[0], 3)), tf.ones((rows[1], 3)), tf.ones(rows[2])

    def run(y, y_pred, weight):
        return per_example_losses(compute, y, y_pred, weight).losses

    if kind != "eager":
        shapes = (
            [[None, 3], [None, 3], [None]]
            if "dynamic" in kind
            else [[rows[0], 3], [rows[1], 3], [rows[2]]]
        )
        run = tf.function(
            run,
            input_signature=[tf.TensorSpec(shape) for shape in shapes],
            autograph=False,
            jit_compile="jit" in kind,
        )
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(y, y_pred, weight)


def test_a_loss_with_a_weight_or_several_outputs_is_not_known(vectorizes):
    model = keras.Model()
    model.compile(loss="mse", loss_weights=[2.0])
    y, y_pred = map(tf.constant, data("regression"))
    doubled = per_example_losses(batch_loss(model), y, y_pred, None).losses
    assert vectorizes
    np.testing.assert_allclose(doubled, 2 * np.mean((y - y_pred) ** 2, axis=1), rtol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_a_row_does_not_see_the_others(name, jit):
    loss, kind = LOSSES[name]
    compute = batch_loss(keras.Model(), loss)
    y, y_pred = map(np.array, data(kind))
    run = tf.function(
        lambda y, y_pred: [
            part[2] for part in tf.nest.flatten(tuple(per_example_losses(compute, y, y_pred, None)))
        ],
        autograph=False,
        jit_compile=jit,
    )
    before = run(tf.constant(y), tf.constant(y_pred))
    others = np.arange(ROWS) != 2
    y_pred[others] = [[np.nan], [np.inf], [1e30], [0.0]] if y_pred.ndim == 2 else np.nan
    after = run(tf.constant(y), tf.constant(y_pred))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
