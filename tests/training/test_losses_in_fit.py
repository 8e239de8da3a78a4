"""Losses in a private `fit`: each update is the clipped sum of what Keras computes on one row."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_bandmf as bandmf
from tests import runs

ROWS = 96
CLIP = 0.2


class OwnLoss(keras.Model):
    """Overrides `compute_loss`."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def build(self, shape):
        """Builds the layer."""
        self.dense.build(shape)

    def call(self, x):
        """Applies the layer."""
        return self.dense(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Looks at x."""
        return keras.ops.mean(keras.ops.square(y_pred - 3 * x[:, :2] - y))


def own_loss():
    model = OwnLoss()
    model.build((None, 3))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 3)).astype(np.float32)
    return model, None, x, rng.normal(size=(ROWS, 2)).astype(np.float32), None, None


def class_weights():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(ROWS, 3)).astype(np.float32), rng.integers(0, 3, ROWS)
    return model, loss, x, y, {0: 0.1, 1: 5.0, 2: 1.0}, np.array([0.1, 5.0, 1.0], np.float32)[y]


def masked_sequences(recurrent=False):
    """Tokens, 0 for padding; some sequences have no token at all."""
    tokens = keras.Input((4,), dtype="int32")
    x = layers.Embedding(7, 3, mask_zero=True)(tokens)
    if recurrent:
        x = layers.SimpleRNN(3, return_sequences=True)(x)
    model = keras.Model(tokens, layers.Dense(5)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    rng = np.random.default_rng(0)
    x = rng.integers(1, 7, (ROWS, 4)).astype(np.int32)
    x[np.arange(4)[None] >= rng.integers(0, 5, ROWS)[:, None]] = 0
    return model, loss, x, rng.integers(0, 5, (ROWS, 4)), None, None


def recurrent_sequences():
    return masked_sequences(recurrent=True)


def expected_update(model, x, y, weight, indices, clipping):
    """Minus the change of the flat weights in the first step, in NumPy."""
    total = 0.0
    for i in indices:
        row = slice(i, i + 1)
        with tf.GradientTape() as tape:
            y_pred = model(tf.constant(x[row]), training=True)
            value = model.compute_loss(
                tf.constant(x[row]),
                tf.constant(y[row]),
                y_pred,
                None if weight is None else tf.constant(weight[row]),
            )
        values = [v.value for v in model.trainable_variables]
        found = [np.asarray(tf.convert_to_tensor(g)) for g in tape.gradient(value, values)]
        flat = np.concatenate([g.ravel() for g in found])
        norm = np.linalg.norm(flat)
        factor = (
            CLIP / (norm + 0.01) if clipping == "automatic" else min(1, CLIP / max(norm, 1e-30))
        )
        total = total + factor * flat
    return total / 8


@pytest.mark.parametrize(
    "make",
    [own_loss, class_weights, masked_sequences, recurrent_sequences],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_first_update(make, clipping):
    """Rule 3, with a class weight or a mask in the place where Keras would have it."""
    plan = runs.make_plan(noise_multiplier=1e-7, num_steps=1, num_bands=1)
    model, loss, x, y, class_weight, weight = make()
    bandmf.privatize(model)
    optimizer = bandmf.BandMFOptimizer(
        keras.optimizers.SGD(1.0), plan, CLIP, clipping=clipping, seed=1
    )
    model.compile(optimizer, loss)
    batches = plan.batches(x, y, class_weight=class_weight, seed=4)
    expected = expected_update(model, x, y, weight, batches.indices(0), clipping)
    (update,) = runs.fit(model, batches, epochs=1, steps_per_epoch=1)
    assert len(batches.indices(0)) > 3 and np.abs(expected).max() > 0.01
    np.testing.assert_allclose(update, expected, atol=1e-5)
