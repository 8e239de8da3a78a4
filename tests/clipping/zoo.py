"""Models for the clipping tests: each returns (compiled model, x, y, sample_weight)."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_bandmf.clipping import declare_row_wise

ROWS = 7


def rng():
    return np.random.default_rng(0)


def floats(*shape):
    return rng().normal(size=(ROWS, *shape)).astype(keras.config.floatx())


def integers(high, *shape):
    return rng().integers(0, high, size=(ROWS, *shape)).astype("int32")


def mlp():
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(7, "gelu"), layers.Dense(3)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    return model, floats(6), integers(3), None


def two_outputs_shared():
    a, b = keras.Input((5,), name="a"), keras.Input((5,), name="b")
    shared = layers.Dense(6, "tanh", name="shared")
    joined = layers.Concatenate()([shared(a), shared(b)])
    outputs = {
        "label": layers.Dense(3, "softmax", name="label")(joined),
        "value": layers.Dense(1, name="value")(shared(b)),
    }
    model = keras.Model({"a": a, "b": b}, outputs)
    model.compile(
        "sgd",
        loss={"label": "sparse_categorical_crossentropy", "value": "mse"},
        loss_weights={"label": 1.0, "value": 0.3},
    )
    x = {"a": floats(5), "b": floats(5)[::-1] * 2}
    y = {"label": integers(3), "value": floats(1)}
    weight = {
        "label": np.linspace(0.1, 2, ROWS).astype("float32"),
        "value": np.linspace(3, 0, ROWS).astype("float32"),
    }
    return model, x, y, weight


def transformer():
    tokens = keras.Input((9,), dtype="int32")
    places = layers.Embedding(9, 8, name="places")
    x = layers.Embedding(20, 8, mask_zero=True, name="words")(tokens)
    x = x + places(keras.ops.zeros_like(tokens) + keras.ops.arange(9, dtype="int32"))
    attended = layers.MultiHeadAttention(2, 4, name="mha")(x, x)
    x = layers.LayerNormalization()(x + attended)
    h = layers.Dense(16, "gelu")(x)
    x = layers.LayerNormalization()(x + layers.Dense(8)(h))
    outputs = layers.Dense(3)(layers.GlobalAveragePooling1D()(x))
    model = keras.Model(tokens, outputs)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = integers(20, 9)
    x[:, 6:] = 0
    return model, x, integers(3), None


def cnn():
    model = keras.Sequential(
        [
            keras.Input((9, 8, 2)),
            layers.Conv2D(4, 3, padding="same", strides=2, use_bias=False),
            layers.GroupNormalization(2),
            layers.ReLU(),
            layers.Conv2D(18, (2, 3), activation="relu"),
            layers.Conv2D(4, 2, padding="same", dilation_rate=2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, "softmax"),
        ]
    )
    model.compile("sgd", "categorical_crossentropy")
    return model, floats(9, 8, 2), np.eye(3, dtype="float32")[integers(3)], None


def conv_text():
    model = keras.Sequential(
        [
            keras.Input((12,), dtype="int32"),
            layers.Embedding(15, 6),
            layers.Conv1D(20, 3, padding="causal", dilation_rate=2, activation="relu"),
            layers.Conv1D(5, 4, strides=3, padding="same"),
            layers.GlobalMaxPooling1D(),
            layers.Dense(1, "sigmoid"),
        ]
    )
    model.compile("sgd", "binary_crossentropy")
    return model, integers(15, 12), integers(2, 1), np.linspace(0, 2, ROWS).astype("float32")


@declare_row_wise
class Block(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = layers.Dense(units, "relu"), layers.Dense(units)
        self.norm = layers.LayerNormalization()

    def build(self, shape):
        self.first.build(shape)
        self.second.build((*shape[:-1], self.first.units))
        self.norm.build((*shape[:-1], self.first.units))

    def call(self, x):
        return self.norm(x + self.second(self.first(x)))


@declare_row_wise
class Nested(keras.Model):
    def __init__(self):
        super().__init__()
        self.block = Block(5)
        self.inner = keras.Sequential([keras.Input((5,)), layers.Dense(5), Block(5)])
        self.unused = layers.Dense(2)
        self.head = layers.Dense(2)

    def build(self, shape):
        for part in (self.block, self.unused, self.head):
            part.build(shape)

    def call(self, x, training=None):
        return self.head(self.inner(self.block(self.block(x)), training=training))


def subclassed():
    model = Nested()
    model.build((None, 5))
    model.compile("sgd", "huber")
    return model, floats(5), floats(2), None


def lstm():
    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            layers.LSTM(4, return_sequences=True),
            layers.Dense(2),
        ]
    )
    model.compile("sgd", "mse")
    # Temporal weights: one per step of every example.
    return model, floats(5, 3), floats(5, 2), np.abs(floats(5))


class Shift(layers.Layer):
    """Nothing is known of it: a model with it runs one example at a time."""

    def build(self, shape):
        self.shift = self.add_weight(shape=(shape[-1],), initializer="uniform")

    def call(self, x):
        return x * keras.ops.exp(self.shift)


@declare_row_wise
class Gated(Shift):
    """Declared and without a rule: it runs one example at a time, and the layers inside do not."""

    def __init__(self):
        super().__init__()
        self.gate = layers.Dense(3, "sigmoid")

    def build(self, shape):
        super().build(shape)
        self.gate.build(shape)

    def call(self, x):
        return super().call(x) * self.gate(x)


def unknown_layer():
    model = keras.Sequential([keras.Input((5, 3)), Shift(), layers.Dense(2)])
    model.compile("sgd", "mse")
    return model, floats(5, 3), floats(5, 2), np.abs(floats(5))


def by_example():
    model = keras.Sequential([keras.Input((5, 3)), Gated(), layers.Dense(2)])
    model.compile("sgd", "mse")
    return model, floats(5, 3), floats(5, 2), None


def autoencoder():
    inputs = keras.Input((8,))
    code = layers.Dense(3, "selu", name="code")(inputs)
    outputs = layers.Dense(8, "sigmoid", name="decode")(code)
    model = keras.Model(inputs, [outputs, code])
    model.compile("sgd", loss=["binary_crossentropy", None])
    x = rng().uniform(size=(ROWS, 8)).astype(keras.config.floatx())
    return model, x, [x], None


def frozen_and_masked():
    tokens = keras.Input((6,), dtype="int32")
    embedding = layers.Embedding(12, 5, mask_zero=True)
    x = embedding(tokens)
    frozen = layers.Dense(5, "relu", name="frozen")
    half = layers.Dense(4, name="half")
    x = half(frozen(x))
    outputs = layers.Dense(3, name="head")(x)
    model = keras.Model(tokens, outputs)
    frozen.trainable = False
    half._kernel.trainable = False
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = integers(12, 6)
    x[:, 4:] = 0
    x[2, 1:] = 0
    return model, x, integers(3, 6), None


def einsum():
    inputs = keras.Input((4, 6))
    x = layers.EinsumDense("abc,cde->abde", (4, 2, 5), bias_axes="de", activation="tanh")(inputs)
    x = layers.EinsumDense("abde,dec->abc", (4, 6), bias_axes="c")(x)
    x = layers.EinsumDense("...x,xy->...y", 3, activation="relu")(x)
    x = layers.EinsumDense("abc,bcd->abd", (4, 2), bias_axes="d")(x)
    x = layers.LayerNormalization(axis=(1, 2))(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    model.compile("sgd", "mae")
    return model, floats(4, 6), floats(2), None


def bert():
    keras_hub = pytest.importorskip("keras_hub")
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=50,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=8,
        dropout=0.0,
    )
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=3, dropout=0.0, preprocessor=None
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    mask = np.ones((ROWS, 8), "int32")
    mask[:, 6:] = 0
    x = {"token_ids": integers(50, 8), "segment_ids": integers(2, 8), "padding_mask": mask}
    return model, x, integers(3), None


def resnet():
    def block(x, filters, strides):
        y = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        y = layers.ReLU()(layers.GroupNormalization(2)(y))
        y = layers.Conv2D(filters, 3, padding="same", use_bias=False)(y)
        y = layers.GroupNormalization(2)(y)
        if strides != 1 or x.shape[-1] != filters:
            x = layers.Conv2D(filters, 1, strides, use_bias=False)(x)
            x = layers.GroupNormalization(2)(x)
        return layers.ReLU()(x + y)

    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(layers.GroupNormalization(2)(x))
    x = block(block(x, 4, 1), 8, 2)
    outputs = layers.Dense(3)(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, floats(8, 8, 3), integers(3), None


ZOO = [
    mlp,
    two_outputs_shared,
    transformer,
    cnn,
    conv_text,
    subclassed,
    lstm,
    unknown_layer,
    by_example,
    autoencoder,
    frozen_and_masked,
    einsum,
    bert,
    resnet,
]
