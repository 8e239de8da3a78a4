"""Losses that mean something else on a batch are told, whatever the first rows are."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, losses, ops

from keras_bandmf.clipping import check_model
from tests.clipping import zoo

ROWS = 24
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(ROWS, 6)).astype("float32")


def model_of(units, loss, activation=None):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(units, activation)])
    model.compile(loss=loss)
    return model


def triplet(labels, embeddings):
    """Batch-hard in spirit: the mean over all triplets of a margin."""
    labels = ops.reshape(ops.cast(labels, "int32"), (-1,))
    far = ops.sum(ops.square(embeddings[:, None] - embeddings[None]), axis=-1)
    same = ops.cast(labels[:, None] == labels[None], far.dtype)
    terms = ops.relu(far[:, :, None] - far[:, None, :] + 0.5)
    chosen = same[:, :, None] * (1.0 - same)[:, None, :]
    return ops.mean(terms * chosen, axis=(1, 2))


def class_balanced(labels, logits):
    """Cross-entropy with the weights of the batch's own classes."""
    labels = ops.reshape(ops.cast(labels, "int32"), (-1,))
    counts = ops.sum(ops.one_hot(labels, 3), axis=0)
    weights = ops.take(1.0 / (counts + 1e-9), labels) * ops.mean(counts)
    each = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return each * weights


FIRST_THREE = {
    "alike": [1, 1, 1],
    "all differ": [0, 1, 2],
    "two alike": [0, 0, 1],
}


@pytest.mark.parametrize("first", FIRST_THREE)
@pytest.mark.parametrize(
    "loss", [triplet, class_balanced, losses.Circle()], ids=["triplet", "balanced", "circle"]
)
def test_a_loss_of_the_batch_is_found_whatever_the_first_rows_are(loss, first):
    y = RANDOM.integers(0, 3, size=ROWS).astype("int32")
    y[:3] = FIRST_THREE[first]
    with pytest.raises(ValueError, match="sum over examples"):
        check_model(model_of(3, loss), X, y)


def test_a_triplet_beyond_its_margin_is_found():
    """Every gradient of the real outputs is zero; those of random outputs are not."""
    model = model_of(3, triplet)
    y = np.repeat(np.arange(3), 8).astype("int32")
    x = np.eye(6, dtype="float32")[y] * 1e3
    with pytest.raises(ValueError, match="sum over examples"):
        check_model(model, x, y)


@pytest.mark.parametrize("make", zoo.ZOO, ids=lambda make: make.__name__)
def test_the_losses_of_the_zoo_pass(make):
    check_model(*make())


LOSSES = [
    (1, "mse", None),
    (1, "mae", None),
    (1, "binary_crossentropy", "sigmoid"),
    (1, losses.BinaryFocalCrossentropy(), "sigmoid"),
    (1, losses.Huber(reduction="sum"), None),
    (1, losses.MeanSquaredError(reduction=None), None),
    (1, losses.Poisson(), "softplus"),
    (1, losses.LogCosh(), None),
    (1, "hinge", None),
    (3, "sparse_categorical_crossentropy", "softmax"),
    (3, losses.SparseCategoricalCrossentropy(from_logits=True), None),
    (3, losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0), None),
]


@pytest.mark.parametrize("units, loss, activation", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_keras_pass_with_any_reduction_and_weights(units, loss, activation, weighted):
    y = RANDOM.integers(0, max(2, units), size=(ROWS, 1))
    weight = RANDOM.uniform(size=ROWS).astype("float32") if weighted else None
    check_model(model_of(units, loss, activation), X, y.astype("float32"), weight)


@pytest.mark.parametrize("loss", ["categorical_crossentropy", "kl_divergence", "cosine_similarity"])
def test_losses_of_distributions_pass(loss):
    y = np.eye(3, dtype="float32")[RANDOM.integers(0, 3, size=ROWS)]
    check_model(model_of(3, loss, "softmax"), X, y)


def test_masked_sequences_pass():
    """Keras divides by the places of the batch that count; here a row by its own: rule 3."""
    tokens = keras.Input((5,), dtype="int32")
    hidden = layers.Embedding(9, 4, mask_zero=True)(tokens)
    model = keras.Model(tokens, layers.Dense(3)(hidden))
    model.compile(loss=losses.SparseCategoricalCrossentropy(from_logits=True))
    x = RANDOM.integers(0, 9, size=(ROWS, 5)).astype("int32")
    check_model(model, x, RANDOM.integers(0, 3, size=(ROWS, 5)))


def test_two_outputs_with_reductions_of_their_own_pass():
    inputs = keras.Input((6,))
    outputs = [layers.Dense(1, name="a")(inputs), layers.Dense(1, name="b")(inputs)]
    model = keras.Model(inputs, outputs)
    model.compile(loss=[losses.MeanSquaredError(reduction="sum"), "mae"], loss_weights=[0.3, 2.0])
    check_model(model, X, [X[:, :1], X[:, 1:2]])


def test_a_loss_that_reads_the_batch_trains_row_by_row_all_the_same():
    """By construction the loss sees one row: its batch never couples the gradients."""
    from keras_bandmf.clipping import clipped_gradients

    model = model_of(3, triplet)
    y = np.repeat(np.arange(3), 8).astype("int32")
    found = tf.function(lambda: clipped_gradients(model, X, y))()
    assert not np.any(found.losses) and not any(np.any(s) for s in found.sums)
