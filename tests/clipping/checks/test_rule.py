"""`check_rule`: right rules pass, wrong ones are caught and named."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_bandmf import clipping


class Scale(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, inputs):
        return inputs * self.scale


class ScaleRule(clipping.LayerRule):
    def forward(self, layer, inputs):
        return inputs * clipping.constant(layer.scale), inputs

    def gradients(self, layer, saved, g):
        return [(layer.scale, clipping.Rows(self.rows(tf.cast(saved, g.dtype) * g)))]

    def rows(self, products):
        return tf.reduce_sum(products, axis=1)


RULE = ScaleRule()
clipping.register_rule(Scale, RULE)


def data():
    return np.random.default_rng(0).normal(size=(4, 5, 3))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("mixed_bfloat16", 5e-2)]
)
def test_a_right_rule_passes(dtype, tolerance):
    error = clipping.check_rule(Scale(dtype=dtype), data())
    assert isinstance(error, float) and error < tolerance


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("rows", lambda p: 0.999 * tf.reduce_sum(p, axis=1), "gradient of scale.*/scale"),
        ("rows", lambda p: tf.reverse(tf.reduce_sum(p, axis=1), [0]), "gradient of scale.*/scale"),
        ("rows", lambda p: tf.reduce_sum(p, axis=1) + 1e-6, "gradient of scale"),
        ("forward", lambda layer, x: (x * clipping.constant(layer.scale) + 1, x), "its outputs"),
        ("forward", lambda layer, x: (x * tf.convert_to_tensor(layer.scale), x), "outside a layer"),
        ("gradients", lambda layer, saved, g: [], "gradient of scale.*/scale"),
    ],
)
def test_a_wrong_rule_is_named(method, wrong, message, monkeypatch):
    monkeypatch.setattr(RULE, method, wrong, raising=False)
    with pytest.raises(ValueError, match=message):
        clipping.check_rule(Scale(dtype="float64"), data())


def test_a_layer_made_of_layers_with_rules():
    layer = layers.MultiHeadAttention(2, 3, dtype="float64")
    x = data()
    assert clipping.check_rule(layer, x, x, use_causal_mask=True) < 1e-9


def test_a_layer_without_a_rule_is_refused():
    class Unknown(Scale):
        pass

    with pytest.raises(ValueError, match="no rule for Unknown.*register_rule"):
        clipping.check_rule(Unknown(), data().astype("float32"))


def test_one_example_is_too_few():
    with pytest.raises(ValueError, match="at least two examples"):
        clipping.check_rule(Scale(), data()[:1])


def test_the_layer_is_left_as_it_was():
    layer = Scale()
    x = data().astype("float32")
    layer(x)
    before = keras.tree.map_structure(np.copy, layer.get_weights())
    clipping.check_rule(layer, x)
    np.testing.assert_array_equal(before, layer.get_weights())
    assert "call" not in vars(layer)


def test_a_frozen_layer_has_nothing_to_check():
    layer = layers.Dense(2)
    layer.trainable = False
    assert clipping.check_rule(layer, data().astype("float32")) == 0
