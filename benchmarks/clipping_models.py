"""The models of the clipping benchmarks, in Keras on any backend."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
from clipping_measure import FULL, Sizes
from keras import layers


def mlp(sizes: Sizes = FULL) -> keras.Model:
    """Three dense layers on flat images."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(sizes.units, "relu"),
            layers.Dense(sizes.units, "relu"),
            layers.Dense(10),
        ]
    )


def cnn(sizes: Sizes = FULL) -> keras.Model:
    """Two convolutions, a pooling and two dense layers on images of MNIST's size."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(sizes.filters, 3, activation="relu"),
            layers.Conv2D(2 * sizes.filters, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, "relu"),
            layers.Dense(10),
        ]
    )


def bert(sizes: Sizes = FULL) -> keras.Model:
    """KerasHub's BERT and a dense layer on its pooled output.

    No dropout: its cost, which differs by framework, would hide that of clipping.
    """
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=sizes.vocabulary,
        num_layers=sizes.blocks,
        num_heads=4,
        hidden_dim=sizes.hidden,
        intermediate_dim=4 * sizes.hidden,
        dropout=0.0,
        max_sequence_length=sizes.tokens,
    )
    # A shape that is known lets every library choose its way by it.
    inputs = {
        name: keras.Input((sizes.tokens,), dtype="int32", name=name)
        for name in ("token_ids", "segment_ids", "padding_mask")
    }
    return keras.Model(inputs, layers.Dense(10)(backbone(inputs)["pooled_output"]))


def embedding(sizes: Sizes = FULL) -> keras.Model:
    """A large table, the mean over the tokens and two dense layers."""
    return keras.Sequential(
        [
            keras.Input((sizes.tokens,), dtype="int32"),
            layers.Embedding(sizes.rows, sizes.width),
            layers.GlobalAveragePooling1D(),
            layers.Dense(128, "relu"),
            layers.Dense(10),
        ]
    )


def wide(sizes: Sizes = FULL) -> keras.Model:
    """A multi-layer perceptron of ten million parameters."""
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(2800, "relu"),
            layers.Dense(2800, "relu"),
            layers.Dense(10),
        ]
    )


def lstm(sizes: Sizes = FULL) -> keras.Model:
    """An LSTM over the rows of an image, and a dense layer: no clipping rule, so row by row."""
    return keras.Sequential(
        [keras.Input((28, 28)), layers.LSTM(4 * sizes.filters), layers.Dense(10)]
    )


BUILDERS = {
    "mlp": mlp,
    "wide": wide,
    "cnn": cnn,
    "bert": bert,
    "embedding": embedding,
    "lstm": lstm,
}


def compiled(name: str, sizes: Sizes = FULL) -> keras.Model:
    """The model of that name, with the loss and optimizer of every step."""
    keras.utils.set_random_seed(0)
    model = BUILDERS[name](sizes)
    model.compile(
        keras.optimizers.SGD(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return model
