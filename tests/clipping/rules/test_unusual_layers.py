"""Layers and settings whose rule does not fit: the layer alone runs one example at a time."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_bandmf import clipping
from tests.clipping import reference

ROWS = 4
# Equation, shape of the outputs and of an example.
EINSUMS = {
    "a label twice in the inputs": ("abbc,cd->abd", (3, 5), (3, 3, 4)),
    "a label twice in the kernel": ("abc,cdd->abd", (3, 5), (3, 4)),
}


def attention(**options):
    return lambda a, b: layers.Attention(**options)([a, b])


CALLS = {
    "scaled": attention(use_scale=True),
    "concatenated": attention(score_mode="concat"),
    "both": attention(use_scale=True, score_mode="concat"),
    "additive": lambda a, b: layers.AdditiveAttention()([a, b]),
    "causal": lambda a, b: layers.AdditiveAttention()([a, b, a[:, :5]], use_causal_mask=True),
}


def compare(inputs, outputs, *shapes):
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(outputs)))
    model.compile(loss="mse")
    random = np.random.default_rng(0)
    for v in model.trainable_variables:
        v.assign(0.5 * random.normal(size=v.shape))
    x = [random.normal(size=(ROWS, *shape)).astype("float32") for shape in shapes]
    y = random.normal(size=(ROWS, 2)).astype("float32")
    clipping.check_model(model, x, y)
    explanation = clipping.explain(model)
    assert explanation.route == "book-keeping", str(explanation)
    assert "by example" in {route for _, _, route, _ in explanation.rows}
    reference.compare(clipping.clipped_gradients, model, x, y)


@pytest.mark.parametrize("name", EINSUMS)
def test_equations_that_the_rule_of_einsum_refuses(name):
    equation, output_shape, shape = EINSUMS[name]
    layer = layers.EinsumDense(equation, output_shape)
    inputs = keras.Input(shape)
    compare([inputs], layer(layers.Dense(shape[-1])(inputs)), shape)


@pytest.mark.parametrize("equation", ["abc,cd->ad", "abc,dcb->abd"])
def test_lora_on_equations_that_the_rule_does_not_factorize(equation):
    layer = layers.EinsumDense(equation, (5,) if equation == "abc,cd->ad" else (3, 5))
    inputs = keras.Input((3, 4))
    before = layers.Dense(4)(inputs)
    layer.build(before.shape)
    layer.enable_lora(2)
    compare([inputs], layer(before), (3, 4))


@pytest.mark.parametrize("name", CALLS)
def test_attention_with_weights_of_its_own(name):
    shapes = (6, 4), (5, 4)
    inputs = [keras.Input(shape) for shape in shapes]
    before = [layers.Dense(4)(t) for t in inputs]
    compare(inputs, CALLS[name](*before), *shapes)
