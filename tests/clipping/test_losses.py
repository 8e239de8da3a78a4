"""The loss of an example is what Keras computes on a batch that holds it alone (rule 3)."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bandmf.clipping.factors import Unsupported
from keras_bandmf.clipping.losses import batch_loss
from keras_bandmf.clipping.row_losses import per_example_losses

ROWS = 5
SHAPES = ("classes", "probabilities", "targets")
L = keras.losses


def data(kind):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(ROWS, 4)).astype("float32")
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    one_hot = np.eye(4, dtype="float32")[rng.integers(0, 4, ROWS)]
    return {
        "regression": (rng.normal(size=(ROWS, 4)).astype("float32"), scores),
        "flat": (rng.normal(size=(ROWS,)).astype("float32"), scores[:, :1]),
        "positive": (rng.uniform(1, 2, (ROWS, 4)).astype("float32"), np.exp(scores)),
        "signs": (np.sign(rng.normal(size=(ROWS, 4))).astype("float32"), scores),
        "binary": (one_hot, probabilities.astype("float32")),
        "classes": (one_hot, probabilities.astype("float32")),
        "sparse": (one_hot.argmax(1), probabilities.astype("float32")),
        "steps": (rng.integers(0, 4, (ROWS, 3)), np.stack([scores] * 3, 1)),
        "masks": (
            rng.integers(0, 2, (ROWS, 4, 4, 1)).astype("float32"),
            rng.uniform(size=(ROWS, 4, 4, 1)).astype("float32"),
        ),
        "ctc": (
            np.array([[1, 2], [1, 1], [2, 0], [3, 1], [1, 0]]),
            rng.normal(size=(ROWS, 6, 4)).astype("float32"),
        ),
    }[kind]


LOSSES = {
    "mse": (L.MeanSquaredError(), "regression"),
    "mse flat": (L.MeanSquaredError(), "flat"),
    "mse sum": (L.MeanSquaredError(reduction="sum"), "regression"),
    "mse none": (L.MeanSquaredError(reduction="none"), "regression"),
    "mae": (L.MeanAbsoluteError(), "regression"),
    "mape": (L.MeanAbsolutePercentageError(), "positive"),
    "msle": (L.MeanSquaredLogarithmicError(), "positive"),
    "cosine": (L.CosineSimilarity(), "regression"),
    "huber": (L.Huber(0.5), "regression"),
    "logcosh": (L.LogCosh(), "regression"),
    "hinge": (L.Hinge(), "signs"),
    "squared hinge": (L.SquaredHinge(), "signs"),
    "categorical hinge": (L.CategoricalHinge(), "classes"),
    "kl": (L.KLDivergence(), "classes"),
    "poisson": (L.Poisson(), "positive"),
    "bce": (L.BinaryCrossentropy(label_smoothing=0.1), "binary"),
    "bce logits": (L.BinaryCrossentropy(from_logits=True), "regression"),
    "focal": (L.BinaryFocalCrossentropy(apply_class_balancing=True), "binary"),
    "cce": (L.CategoricalCrossentropy(label_smoothing=0.1), "classes"),
    "categorical focal": (L.CategoricalFocalCrossentropy(), "classes"),
    "generalized": (L.CategoricalGeneralizedCrossEntropy(), "sparse"),
    "sparse": (L.SparseCategoricalCrossentropy(), "sparse"),
    "ignored class": (
        L.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2),
        "steps",
    ),
    "dice": (L.Dice(), "masks"),
    "dice by image": (L.Dice(axis=(1, 2, 3)), "masks"),
    "tversky": (L.Tversky(axis=(1, 2, 3)), "masks"),
    "circle": (L.Circle(), "sparse"),
    "ctc": (L.CTC(), "ctc"),
    "function": (lambda y, p: tf.reduce_mean(tf.abs(y - p) ** 3), "regression"),
    "name": ("mse", "regression"),
}


def same_as_alone(loss, y, y_pred, weight=None, mask=None):
    """Values and gradients of the vectorised losses against batches of one."""
    y_pred = tf.constant(y_pred)
    compute = batch_loss(keras.Model(), loss)
    if mask is not None:
        y_pred._keras_mask = mask
    y, weight = (None if t is None else tf.constant(t) for t in (y, weight))
    losses, outputs, (slopes,) = per_example_losses(compute, y, y_pred, weight)
    assert len(outputs) == 1 and outputs[0] is y_pred
    assert losses.shape == (ROWS,)

    model = keras.Model()
    model.compile(loss=loss)
    for i in range(ROWS):
        row = slice(i, i + 1)
        alone = y_pred[row]
        with tf.GradientTape() as tape:
            tape.watch(alone)
            if mask is not None:
                alone._keras_mask = mask[row]
            one = None if weight is None else weight[row]
            value = tf.reduce_sum(model.compute_loss(None, y[row], alone, one))
        np.testing.assert_allclose(losses[i], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slopes[i], tape.gradient(value, alone)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_keras_loss(name):
    loss, kind = LOSSES[name]
    same_as_alone(loss, *data(kind))


@pytest.mark.parametrize("name", ["mse", "mse sum", "mse none", "sparse", "ctc"])
def test_sample_weights(name):
    loss, kind = LOSSES[name]
    same_as_alone(loss, *data(kind), np.linspace(0, 3, ROWS).astype("float32"))


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("weighted", [False, True])
def test_masks_and_temporal_weights(reduction, weighted):
    loss = L.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    mask = tf.constant(np.arange(3)[None] <= np.arange(ROWS)[:, None] - 1)  # row 0: nothing at all
    weight = np.linspace(0.2, 2, ROWS * 3).reshape(ROWS, 3).astype("float32")
    same_as_alone(loss, *data("steps"), weight if weighted else None, mask)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("activation", ["softmax", tf.nn.softmax])
def test_saturated_softmax_uses_its_logits(activation, graph):
    """Keras differentiates crossentropy through the logits, also where softmax saturates."""
    layer = keras.layers.Activation(activation)
    logits = tf.constant([[200.0, 0.0, 0.0], [0.0, 300.0, 1.0]])
    y = tf.constant([1, 0])
    compute = batch_loss(keras.Model(), "sparse_categorical_crossentropy")

    def slopes(one_by_one):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            if one_by_one:
                rows = [compute(None, y[i : i + 1], layer(logits[i : i + 1]), None) for i in (0, 1)]
                return tape.gradient(rows, logits)
            y_pred = layer(logits)
        found = per_example_losses(compute, y, y_pred, None)
        return tape.gradient(found.outputs, logits, output_gradients=found.slopes)

    run = tf.function(slopes) if graph else slopes
    np.testing.assert_allclose(run(False), run(True), atol=1e-6)


def test_structures():
    """Lists and dicts of outputs, a loss for some of them, and loss weights."""
    inputs = keras.Input((3,))
    outputs = {k: keras.layers.Dense(2, name=k)(inputs) for k in ("a", "b", "c")}
    model = keras.Model(inputs, outputs)
    model.compile(loss={"a": "mse", "b": "mae"}, loss_weights={"a": 2.0, "b": 0.5})
    rng = np.random.default_rng(1)
    x = tf.constant(rng.normal(size=(ROWS, 3)), tf.float32)
    y = {k: tf.constant(rng.normal(size=(ROWS, 2)), tf.float32) for k in ("a", "b", "c")}
    weight = {k: tf.constant(rng.uniform(size=ROWS), tf.float32) for k in ("a", "b", "c")}
    y_pred = model(x)
    losses, outputs, _ = per_example_losses(batch_loss(model), y, y_pred, weight)
    assert len(outputs) == 2  # not the one without a loss
    expected = 2 * np.mean((y["a"] - y_pred["a"]) ** 2, 1) * weight["a"]
    expected += 0.5 * np.mean(np.abs(y["b"] - y_pred["b"]), 1) * weight["b"]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # The trackers of single outputs, had they been touched, would have counted a step per example.
    assert all(float(m.total) == 0 and float(m.count) == 0 for m in model._compile_loss.metrics)


def test_a_loss_that_reads_weights_is_unsupported():
    weight = tf.Variable([2.0])
    compute = batch_loss(keras.Model(), lambda y, p: weight * (y - p) ** 2)
    data = tf.zeros((3, 1)), tf.ones((3, 1))
    with pytest.raises(Unsupported, match="by itself"):
        per_example_losses(compute, *data, None, [weight])
    np.testing.assert_allclose(per_example_losses(compute, *data, None).losses, [2, 2, 2])


def test_no_loss_is_an_error():
    with pytest.raises(ValueError, match="loss="):
        batch_loss(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
