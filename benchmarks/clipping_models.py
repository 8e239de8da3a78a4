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
    inputs = _tokens(sizes, "token_ids", "segment_ids", "padding_mask")
    return keras.Model(inputs, layers.Dense(10)(backbone(inputs)["pooled_output"]))


def _tokens(sizes: Sizes, *names: str) -> dict:
    # A shape that is known lets every library choose its way by it.
    return {name: keras.Input((sizes.tokens,), dtype="int32", name=name) for name in names}


def t5(sizes: Sizes = FULL) -> keras.Model:
    """The encoder of KerasHub's T5, small, and a dense layer on the mean over its tokens."""
    import keras_hub

    backbone = keras_hub.models.T5Backbone(
        vocabulary_size=sizes.small_vocabulary,
        num_layers=sizes.small_blocks,
        num_heads=2,
        hidden_dim=sizes.small_hidden,
        intermediate_dim=2 * sizes.small_hidden,
        dropout=0.0,
    )
    names = ("encoder_token_ids", "encoder_padding_mask")
    encoder = keras.Model(
        [backbone.input[name] for name in names], backbone.output["encoder_sequence_output"]
    )
    inputs = _tokens(sizes, "token_ids", "padding_mask")
    found = encoder([inputs["token_ids"], inputs["padding_mask"]])
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(found)))


def deberta(sizes: Sizes = FULL) -> keras.Model:
    """KerasHub's DeBERTa, small, and a dense layer on its first token."""
    import keras_hub

    backbone = keras_hub.models.DebertaV3Backbone(
        vocabulary_size=sizes.small_vocabulary,
        num_layers=sizes.small_blocks,
        num_heads=2,
        hidden_dim=sizes.small_hidden,
        intermediate_dim=2 * sizes.small_hidden,
        dropout=0.0,
        max_sequence_length=sizes.tokens,
        bucket_size=max(sizes.tokens // 2, 2),
    )
    inputs = _tokens(sizes, "token_ids", "padding_mask")
    return keras.Model(inputs, layers.Dense(10)(backbone(inputs)[:, 0]))


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
    """An LSTM over a sequence, and a dense layer on its last output."""
    inputs = keras.Input((sizes.steps, sizes.features))
    return keras.Sequential([inputs, layers.LSTM(sizes.units_over_time), layers.Dense(10)])


BUILDERS = {
    "mlp": mlp,
    "wide": wide,
    "cnn": cnn,
    "bert": bert,
    "embedding": embedding,
    "lstm": lstm,
    "t5": t5,
    "deberta": deberta,
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
